//! Devices by name, and a plain sentence where one is missing.

use burn::tensor::Device;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
use burn::tensor::DeviceType;

/// A device that is not there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no device {wanted:?}: {reason}; found: {}", found.join(", "))]
pub struct NoDevice {
    /// The name that was asked for.
    pub wanted: String,
    /// Why it is not there.
    pub reason: String,
    /// Names that would have worked.
    pub found: Vec<String>,
}

/// A device by name: `flex`, `ndarray`, `wgpu` or `cuda`, each behind the feature of its name; the
/// GPUs of a machine with several are `cuda:0`, `cuda:1`, …
///
/// # Errors
///
/// If this build or this machine has no such device, the error lists those that it has.
pub fn device(name: &str) -> Result<Device, NoDevice> {
    let refuse = |reason: String| Err(NoDevice { wanted: name.into(), reason, found: available() });
    let (kind, index) = match name.split_once(':') {
        Some((kind, index)) => match index.parse::<usize>() {
            Ok(index) => (kind, index),
            Err(_) => return refuse(format!("{index:?} is no number")),
        },
        None => (name, 0),
    };
    let Some((feature, devices)) = kinds().into_iter().find(|(known, _)| *known == kind) else {
        return refuse("no backend has this name".into());
    };
    let Some(devices) = devices else {
        return refuse(format!("this program was built without the feature `{feature}`"));
    };
    let devices = devices();
    let count = devices.len();
    match devices.into_iter().nth(index) {
        Some(device) => Ok(device),
        None if count == 0 => refuse(missing(kind).into()),
        None => refuse(format!("there are {count}, counted from 0")),
    }
}

/// A device for what is not worth another one: the CPU, if this build has a backend for it, else
/// the first device there is.
///
/// # Panics
///
/// If this build has no backend at all.
pub fn host_device() -> Device {
    let first = available().into_iter().next();
    let name = first.expect("one of the features flex, ndarray, wgpu and cuda must be on");
    device(&name).expect("it was found a moment ago")
}

/// Names of the devices of this build that this machine has.
pub fn available() -> Vec<String> {
    let mut found = Vec::new();
    for (kind, devices) in kinds() {
        let count = devices.map_or(0, |devices| devices().len());
        found.extend(
            (0..count)
                .map(|index| if count == 1 { kind.to_owned() } else { format!("{kind}:{index}") }),
        );
    }
    found
}

/// A backend: its name, which is that of its feature, and its devices if the feature is on.
type Kind = (&'static str, Option<fn() -> Vec<Device>>);

#[allow(unused_mut, unused_assignments, reason = "no feature may be on")]
#[allow(deprecated, reason = "users ask for ndarray, which upstream deprecates in favour of flex")]
fn kinds() -> Vec<Kind> {
    let mut kinds: Vec<Kind> = ["flex", "ndarray", "wgpu", "cuda"].map(|name| (name, None)).into();
    #[cfg(feature = "flex")]
    (kinds[0].1 = Some(|| vec![Device::flex()]));
    #[cfg(feature = "ndarray")]
    (kinds[1].1 = Some(|| vec![Device::ndarray()]));
    #[cfg(feature = "wgpu")]
    (kinds[2].1 = Some(|| Device::enumerate(DeviceType::Wgpu).into_iter().collect()));
    #[cfg(feature = "cuda")]
    (kinds[3].1 = Some(|| Device::enumerate(DeviceType::Cuda).into_iter().collect()));
    kinds
}

fn missing(kind: &str) -> &'static str {
    match kind {
        "wgpu" => {
            "no adapter for Vulkan, Metal or DirectX was found (Mesa's software Vulkan is one)"
        }
        _ => "no NVIDIA driver with a device was found",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_available_can_be_had_and_nothing_else() {
        for name in available() {
            device(&name).unwrap();
        }
        assert!(available().contains(&"flex".to_owned()));
        let message = |name: &str| device(name).unwrap_err().to_string();
        let found = available().join(", ");
        assert_eq!(
            message("gpu"),
            format!("there is no device \"gpu\": no backend has this name; found: {found}")
        );
        assert_eq!(
            message("flex:1"),
            format!("there is no device \"flex:1\": there are 1, counted from 0; found: {found}")
        );
        assert_eq!(
            message("flex:x"),
            format!("there is no device \"flex:x\": \"x\" is no number; found: {found}")
        );
        if !cfg!(feature = "cuda") {
            let reason = "this program was built without the feature `cuda`";
            assert_eq!(
                message("cuda"),
                format!("there is no device \"cuda\": {reason}; found: {found}")
            );
        }
    }
}
