//! Where documents come from: files, directories, standard input.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::document::{Desired, parse};
use crate::error::CtlError;

/// Largest file, in bytes.
const MAX_FILE_BYTES: u64 = 4 << 20;
/// Most documents of one command.
const MAX_DOCUMENTS: usize = 10_000;

/// Every document, in the order of the arguments and, in a directory, of the file names.
///
/// # Errors
/// The first file that cannot be read, or document that is wrong, with its place; and a name that stands twice.
pub(crate) fn read(paths: &[PathBuf]) -> Result<Vec<Desired>, CtlError> {
    let mut all = Vec::new();
    for path in paths {
        if path == Path::new("-") {
            let text = bounded(path, std::io::stdin())?;
            all.extend(parse("standard input", &text)?);
            continue;
        }
        for file in files(path)? {
            let failed = |source| CtlError::File { action: "read", path: file.clone(), source };
            let text = bounded(&file, std::fs::File::open(&file).map_err(failed)?)?;
            all.extend(parse(&file.display().to_string(), &text)?);
        }
        if all.len() > MAX_DOCUMENTS {
            return Err(CtlError::Usage(format!(
                "more than {MAX_DOCUMENTS} documents; apply them in several parts"
            )));
        }
    }
    if all.is_empty() {
        return Err(CtlError::Usage("the files hold no documents".to_owned()));
    }
    let mut places = BTreeMap::new();
    for desired in &all {
        if let Some(first) = places.insert((&desired.project, &desired.name), &desired.place) {
            let (place, name) = (&desired.place, &desired.name);
            return Err(CtlError::Document(format!(
                "{place}: name: instance {name:?} stands here again, first in {first}"
            )));
        }
    }
    Ok(all)
}

fn files(path: &Path) -> Result<Vec<PathBuf>, CtlError> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let failed = |source| CtlError::File { action: "list", path: path.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        let extension = file.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if matches!(extension, "yaml" | "yml" | "json") && file.is_file() {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        let text = format!("{} holds no .yaml, .yml or .json files", path.display());
        return Err(CtlError::Usage(text));
    }
    Ok(files)
}

fn bounded(path: &Path, file: impl Read) -> Result<String, CtlError> {
    let failed = |source| CtlError::File { action: "read", path: path.to_owned(), source };
    let mut text = String::new();
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        let limit = MAX_FILE_BYTES >> 20;
        return Err(CtlError::Document(format!("{}: has more than {limit} MiB", path.display())));
    }
    Ok(text)
}
