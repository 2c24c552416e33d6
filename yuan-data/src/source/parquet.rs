//! Tables in Parquet's layout: a document a row of one column.

use std::{
    fs::File,
    panic::{UnwindSafe, catch_unwind},
    path::Path,
};

use parquet::{
    basic::Type,
    column::reader::{ColumnReader, ColumnReaderImpl},
    data_type::{ByteArray, ByteArrayType},
    file::reader::{FileReader, SerializedFileReader},
};

use super::{Next, lines::Rest};

/// Rows that are decoded at once.
const AT_ONCE: usize = 256;

/// The rows of one column.
pub(super) struct Rows {
    file: SerializedFileReader<File>,
    field: String,
    column: usize,
    bytes: u64,
    /// Row group that comes next, and the reader of the one before it.
    group: usize,
    reader: Option<ColumnReaderImpl<ByteArrayType>>,
    /// Of the next group: rows to leave out.
    skip: u64,
    num_rows: u64,
    rows: u64,
    /// Definition level of a value that is there.
    max_level: i16,
    /// Decoded and not yet returned, the next one last; none where the row has no value. They may
    /// all be parts of one dictionary, so none is copied before it is wanted.
    decoded: Vec<Option<ByteArray>>,
    rest: Option<Rest>,
}

impl Rows {
    /// Behind so many rows.
    pub fn open(path: &Path, field: &str, rows: u64) -> Result<Self, String> {
        unless_it_panics(|| Self::open_here(path, field, rows))
    }

    fn open_here(path: &Path, field: &str, rows: u64) -> Result<Self, String> {
        let failed = |error: parquet::errors::ParquetError| error.to_string();
        let file = File::open(path).map_err(|error| error.to_string())?;
        let bytes = file.metadata().map_err(|error| error.to_string())?.len();
        let file = SerializedFileReader::new(file).map_err(failed)?;
        let metadata = file.metadata();
        let schema = metadata.file_metadata().schema_descr();
        let column =
            (0..schema.num_columns()).find(|&at| schema.column(at).path().string() == field);
        let Some(column) = column else {
            let columns =
                (0..schema.num_columns().min(8)).map(|at| schema.column(at).path().string());
            let columns = columns.collect::<Vec<_>>().join(", ");
            return Err(format!("it has no column `{field}`, but {columns}"));
        };
        let description = schema.column(column);
        if description.physical_type() != Type::BYTE_ARRAY || description.max_rep_level() > 0 {
            return Err(format!("its column `{field}` holds no texts"));
        }
        let num_rows = metadata.file_metadata().num_rows().max(0) as u64;
        // Groups that were read already.
        let (mut group, mut skip) = (0, rows);
        while group < metadata.num_row_groups() {
            let size = metadata.row_group(group).num_rows().max(0) as u64;
            if skip < size {
                break;
            }
            skip -= size;
            group += 1;
        }
        Ok(Self {
            file,
            field: field.to_owned(),
            column,
            bytes,
            group,
            reader: None,
            skip,
            num_rows,
            rows,
            max_level: description.max_def_level(),
            decoded: Vec::new(),
            rest: None,
        })
    }

    pub fn bytes_read(&self) -> u64 {
        (self.bytes as f64 * self.rows as f64 / self.num_rows.max(1) as f64) as u64
    }

    pub fn rows(&self) -> u64 {
        self.rows
    }

    pub fn next(&mut self) -> Next {
        if let Some(rest) = self.rest.take() {
            return rest.next(&mut self.rest);
        }
        if self.decoded.is_empty() {
            let decode = std::panic::AssertUnwindSafe(|| self.decode());
            if let Err(reason) = unless_it_panics(decode) {
                return Next::Broken(reason);
            }
        }
        let Some(row) = self.decoded.pop() else { return Next::End };
        self.rows += 1;
        let text = row.and_then(|value| String::from_utf8(value.data().to_vec()).ok());
        match text.filter(|text| !text.trim().is_empty() && !text.contains('\0')) {
            Some(text) => Rest::of(text).next(&mut self.rest),
            None => Next::None(format!("rows without a `{}`", self.field)),
        }
    }

    /// Decodes more rows; none are left if nothing is decoded afterwards.
    fn decode(&mut self) -> Result<(), String> {
        let failed = |error: parquet::errors::ParquetError| error.to_string();
        while self.decoded.is_empty() {
            let Some(reader) = &mut self.reader else {
                if self.group >= self.file.metadata().num_row_groups() {
                    return Ok(());
                }
                let group = self.file.get_row_group(self.group).map_err(failed)?;
                let reader = group.get_column_reader(self.column).map_err(failed)?;
                let ColumnReader::ByteArrayColumnReader(mut reader) = reader else {
                    return Err(format!("its column `{}` holds no texts", self.field));
                };
                if self.skip > 0 {
                    reader.skip_records(self.skip as usize).map_err(failed)?;
                    self.skip = 0;
                }
                self.group += 1;
                self.reader = Some(reader);
                continue;
            };
            let (mut levels, mut values): (Vec<i16>, Vec<ByteArray>) = (Vec::new(), Vec::new());
            let (read, _, _) = reader
                .read_records(AT_ONCE, Some(&mut levels), None, &mut values)
                .map_err(failed)?;
            if read == 0 {
                self.reader = None;
                continue;
            }
            // A column without nulls has no levels.
            let is_there =
                |row: usize| levels.get(row).is_none_or(|&level| level == self.max_level);
            let mut values = values.into_iter();
            let value = |row| if is_there(row) { values.next() } else { None };
            self.decoded = (0..read).map(value).collect();
            self.decoded.reverse();
        }
        Ok(())
    }
}

/// What `read` returns; the library takes much for granted that a damaged file does not have, and
/// panics where it is missing.
fn unless_it_panics<T>(read: impl FnOnce() -> Result<T, String> + UnwindSafe) -> Result<T, String> {
    catch_unwind(read).unwrap_or_else(|_| Err("it is a damaged table".into()))
}
