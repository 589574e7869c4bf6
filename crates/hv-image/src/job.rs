//! One pull or upload, and what all parts of it share.

use std::fs::File;
use std::sync::Arc;
use std::time::SystemTime;

use hv_types::InstanceType;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::flight::Flights;
use crate::form::Form;
use crate::layout::{Layout, VERSION};
use crate::progress::{Phase, Reporter};
use crate::record::ImageRecord;
use crate::state::State;
use crate::store::StoredImage;
use crate::{ImageError, Result, StoreOptions};

/// What all clones of a store share.
pub(crate) struct Inner {
    pub(crate) options: StoreOptions,
    pub(crate) layout: Layout,
    pub(crate) state: Mutex<State>,
    pub(crate) flights: Flights,
    /// Held as long as the store is open.
    pub(crate) _lock: File,
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Job {
    pub(crate) inner: Arc<Inner>,
    /// For messages: the reference, or the name of an upload.
    pub(crate) image: String,
    pub(crate) name: String,
    pub(crate) instance_type: InstanceType,
    pub(crate) progress: Reporter,
    pub(crate) cancel: CancellationToken,
}

/// Keeps a blob or form from being swept away.
pub(crate) struct Pin {
    inner: Arc<Inner>,
    what: String,
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.inner.state.lock().unpin(&self.what);
    }
}

/// Where an image came from, for its record.
#[derive(Clone, Debug, Default)]
pub(crate) struct Origin {
    pub(crate) source: String,
    pub(crate) source_digest: String,
    pub(crate) validator: String,
}

impl Job {
    pub(crate) fn pin(&self, what: impl ToString) -> Pin {
        let what = what.to_string();
        self.inner.state.lock().pin(&what);
        Pin { inner: Arc::clone(&self.inner), what }
    }

    pub(crate) fn cancelled(&self) -> ImageError {
        ImageError::Cancelled { image: self.image.clone() }
    }

    pub(crate) fn refused(&self, reason: impl Into<String>) -> ImageError {
        ImageError::refused(&self.image, reason)
    }

    pub(crate) fn unsupported(&self, reason: impl Into<String>) -> ImageError {
        ImageError::Unsupported { image: self.image.clone(), reason: reason.into() }
    }

    pub(crate) fn unpacks_to_too_much(&self, what: &str) -> ImageError {
        ImageError::TooLarge {
            image: self.image.clone(),
            what: what.to_owned(),
            limit: format!("{} bytes", self.inner.options.max_unpacked_bytes),
            option: "max_unpacked_bytes",
        }
    }

    /// The key of the form that a digest becomes for this job's type.
    pub(crate) fn form_key(&self, hex: &str) -> String {
        format!("{}-{hex}", self.instance_type)
    }

    pub(crate) fn has_form(&self, key: &str) -> bool {
        self.inner.state.lock().form(key).is_some()
    }

    /// Takes a form into the store.
    pub(crate) fn keep_form(&self, key: &str, form: Form) -> Result<()> {
        let (record, scratch) = form.seal()?;
        self.inner.state.lock().insert_form(key, record, scratch.path())
    }

    /// Gives the name to a form that is there.
    pub(crate) fn keep_image(&self, form: &str, origin: Origin) -> Result<StoredImage> {
        let mut state = self.inner.state.lock();
        let now = SystemTime::now();
        let known = state.image(&self.name, self.instance_type).filter(|image| image.form == form);
        let created_at = known.map_or(now, |image| image.created_at);
        let digest = state.form(form).map(|form| form.digest.clone()).unwrap_or_default();
        let stored = state.insert_image(ImageRecord {
            version: VERSION,
            name: self.name.clone(),
            instance_type: self.instance_type,
            digest,
            source_digest: origin.source_digest,
            source: origin.source,
            validator: origin.validator,
            form: form.to_owned(),
            created_at,
            last_used: now,
        })?;
        self.progress.begin(Phase::Done, stored.info.size_bytes);
        self.progress.add(stored.info.size_bytes);
        Ok(stored)
    }
}
