//! The default corpus, without a data set to download: the crates that this project was built from.
//!
//! Cargo has unpacked them in its registry: English documentation and Rust code, and `Cargo.lock`
//! pins every byte. Cargo may fetch a few manifests that nothing was built from.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    process::Command,
};

use serde::Deserialize;

use yuan_data::{DataError, Document, files_below, read_document};

/// Text that one crate may contribute, so that none dominates.
const BYTES_PER_CRATE: usize = 1 << 16;

/// Reads sources and Markdown of the registry crates that the package of `manifest` needs on
/// every platform (so that the corpus is the same everywhere), ordered by crate and path.
///
/// # Errors
///
/// If Cargo cannot list the crates, or none of them is there.
pub fn read_crate_sources(manifest: &Path) -> Result<Vec<Document>, DataError> {
    let mut documents = Vec::new();
    for (name, root) in platform_independent_crates(&metadata(manifest)?) {
        let mut left = BYTES_PER_CRATE;
        for file in files_below(&root)? {
            if !file.extension().is_some_and(|extension| extension == "rs" || extension == "md") {
                continue;
            }
            let path =
                file.strip_prefix(&root).unwrap_or(&file).to_string_lossy().replace('\\', "/");
            // A text may be longer than its file.
            let document = read_document(format!("{name}/{path}"), &file, left as u64)?;
            if let Some(document) = document.filter(|document| document.text.len() <= left) {
                left -= document.text.len();
                documents.push(document);
            }
        }
    }
    if documents.is_empty() {
        return Err(DataError::NoText(
            "cargo knows no registry crates to read; name a directory of text instead".into(),
        ));
    }
    Ok(documents)
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    source: Option<String>,
    manifest_path: PathBuf,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
    /// The package that the manifest is of.
    root: Option<String>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<DependencyKind>,
}

#[derive(Deserialize)]
struct DependencyKind {
    kind: Option<String>,
    target: Option<String>,
}

/// The line of Cargo's output that says what is wrong.
fn reason_in(output: &str) -> &str {
    let is_error = |line: &&str| line.starts_with("error");
    let line = output.lines().find(is_error).or(output.lines().next());
    line.unwrap_or("it gave no reason").trim_start_matches("error: ")
}

fn metadata(manifest: &Path) -> Result<Metadata, DataError> {
    let failed = |reason: String| {
        DataError::NoText(format!(
            "cargo cannot list the crates of {}: {}; name a directory of text instead",
            manifest.display(),
            reason_in(&reason)
        ))
    };
    // The host's crates are there, since this program was built from them; others may not be.
    let host = env!("YUAN_TARGET");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let list = |offline: &[&str]| {
        let mut command = Command::new(&cargo);
        command.args(["metadata", "--format-version", "1", "--locked", "--filter-platform", host]);
        command.args(offline).arg("--manifest-path").arg(manifest).output()
    };
    let mut output = list(&["--offline"]).map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        // Cargo wants to see the manifests of all crates of the workspace, also of those that
        // nothing was built from yet: a few of them may have to be downloaded.
        output = list(&[]).map_err(|error| failed(error.to_string()))?;
    }
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| failed(error.to_string()))
}

/// Registry crates reached from the package by dependencies that no platform restricts, by name.
fn platform_independent_crates(metadata: &Metadata) -> BTreeMap<String, PathBuf> {
    let packages: HashMap<&str, &Package> =
        metadata.packages.iter().map(|p| (p.id.as_str(), p)).collect();
    let nodes: HashMap<&str, &Node> =
        metadata.resolve.nodes.iter().map(|n| (n.id.as_str(), n)).collect();
    let mut found = BTreeMap::new();
    let mut left: Vec<&str> = metadata.resolve.root.as_deref().into_iter().collect();
    let mut seen: std::collections::HashSet<&str> = left.iter().copied().collect();
    while let Some(id) = left.pop() {
        if let Some(package) = packages.get(id).filter(|package| package.source.is_some()) {
            let root = package.manifest_path.parent().unwrap_or(Path::new(".")).to_path_buf();
            found.insert(format!("{}-{}", package.name, package.version), root);
        }
        let Some(node) = nodes.get(id) else { continue };
        let everywhere = |kind: &DependencyKind| kind.kind.is_none() && kind.target.is_none();
        for dependency in
            node.deps.iter().filter(|dependency| dependency.dep_kinds.iter().any(everywhere))
        {
            if seen.insert(&dependency.pkg) {
                left.push(&dependency.pkg);
            }
        }
    }
    found
}
