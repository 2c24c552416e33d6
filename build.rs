//! Tells the crate which target it is built for, as Cargo names it.

fn main() {
    let target = std::env::var("TARGET").unwrap_or_default();
    println!("cargo::rustc-env=YUAN_TARGET={target}");
    println!("cargo::rerun-if-changed=build.rs");
}
