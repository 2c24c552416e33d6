//! How much memory a run took.

/// Most memory that this process ever had in use, in bytes, where the system tells (Linux); memory
/// of a GPU is not in it.
pub fn peak_resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_that_of_what_was_used() {
        let before = peak_resident().unwrap();
        let used = std::hint::black_box(vec![1_u8; 64 << 20]);
        assert!(peak_resident().unwrap() >= used.len() as u64);
        assert!(peak_resident().unwrap() >= before);
    }
}
