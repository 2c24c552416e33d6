//! The JSON header of a safetensors file, checked by the `safetensors` crate and against what it
//! lets pass.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};

use super::{Metadata, OutgoingTensor, TensorInfo, tensor::StoredTensor};

/// Longest header that the format allows.
pub(super) const LARGEST: u64 = 100_000_000;

/// Tensors by name, and what else a header says by key.
type Contents = (BTreeMap<String, StoredTensor>, BTreeMap<String, String>);

/// What a header lists; the first of the tensors' bytes is at `start`.
pub(super) fn parse(text: &[u8], start: u64) -> Result<Contents, String> {
    let text =
        std::str::from_utf8(text).map_err(|error| format!("its header is no text: {error}"))?;
    let bad = |error: serde_json::Error| format!("its header is damaged: {error}");
    // The format's own reader would silently take the last of two tensors of one name.
    let Names { repeated } = serde_json::from_str(text).map_err(bad)?;
    if !repeated.is_empty() {
        let repeated: Vec<_> = repeated.iter().map(|name| format!("`{name}`")).collect();
        return Err(format!("its header lists twice: {}", repeated.join(", ")));
    }
    let metadata: Metadata = serde_json::from_str(text).map_err(bad)?;
    let stored = |(name, info): (String, &TensorInfo)| {
        let (begin, end) = info.data_offsets;
        let offset = start
            .checked_add(begin as u64)
            .filter(|offset| offset.checked_add((end - begin) as u64).is_some());
        let offset = offset.ok_or_else(|| format!("`{name}` lies beyond the end of any file"))?;
        Ok((
            name,
            StoredTensor {
                dtype: info.dtype,
                shape: info.shape.clone(),
                offset,
                bytes: end - begin,
            },
        ))
    };
    let tensors = metadata.tensors().into_iter().map(stored).collect::<Result<_, String>>()?;
    let said = metadata.metadata().iter().flatten();
    Ok((tensors, said.map(|(key, value)| (key.clone(), value.clone())).collect()))
}

/// Length and text of the header, padded so that the tensors are aligned.
pub(super) fn render(
    tensors: &[OutgoingTensor],
    metadata: &[(&str, String)],
) -> Result<Vec<u8>, String> {
    let mut names = BTreeSet::new();
    let mut offset = 0;
    let mut infos = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        if !names.insert(&tensor.name) {
            return Err(format!("`{}` would be written twice", tensor.name));
        }
        let end = offset + tensor.bytes();
        let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
        infos.push((tensor.name.clone(), TensorInfo { dtype, shape, data_offsets: (offset, end) }));
        offset = end;
    }
    // Readers of PyTorch's files look for this.
    let format = [("format".to_owned(), "pt".to_owned())].into_iter();
    let more = metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone()));
    let metadata = Metadata::new(Some(format.chain(more).collect()), infos)
        .map_err(|error| error.to_string())?;
    let mut header = serde_json::to_value(&metadata).map_err(|error| error.to_string())?;
    // The library keeps these in no order, and the same model is to be the same file.
    if let Some(more) = header["__metadata__"].as_object_mut() {
        more.sort_keys();
    }
    let mut text = serde_json::to_vec(&header).map_err(|error| error.to_string())?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    Ok(header)
}

/// Keys of an object that occur more than once.
struct Names {
    repeated: BTreeSet<String>,
}

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(NamesVisitor)
    }
}

struct NamesVisitor;

impl<'de> Visitor<'de> for NamesVisitor {
    type Value = Names;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Names, A::Error> {
        let (mut seen, mut repeated) = (BTreeSet::new(), BTreeSet::new());
        while let Some((name, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
            if !seen.insert(name.clone()) {
                repeated.insert(name);
            }
        }
        Ok(Names { repeated })
    }
}
