//! What the store knows, in memory as on disk. Every change is written first, then made.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::SystemTime;

use hv_driver::LocalImage;
use hv_types::{ImageInfo, InstanceId, InstanceType};

use crate::layout::{self, Layout, VERSION};
use crate::record::{FormRecord, ImageRecord, Use, UserRecord, image_file_name};
use crate::reference::Digest;
use crate::store::StoredImage;
use crate::{ImageError, Result};

/// Most instances that a refusal names.
const MAX_NAMED_USERS: usize = 5;

/// A name and a type.
type Key = (String, &'static str);

/// See the module.
pub(crate) struct State {
    layout: Layout,
    images: BTreeMap<Key, ImageRecord>,
    forms: HashMap<String, FormRecord>,
    users: BTreeMap<InstanceId, UserRecord>,
    /// Blobs and forms that a pull is working with, and how many.
    pins: HashMap<String, usize>,
}

impl State {
    /// Reads everything. What a crash left unfinished is swept away; a record that cannot be read is an
    /// error, as is a name whose
    /// form is gone: that one is forgotten with a warning, so that it can be pulled again.
    pub(crate) fn load(layout: Layout) -> Result<Self> {
        for path in layout::entries(&layout.tmp())? {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(ImageError::io("remove", &path))?;
        }
        let mut state = Self {
            images: BTreeMap::new(),
            forms: HashMap::new(),
            users: BTreeMap::new(),
            pins: HashMap::new(),
            layout,
        };
        for path in layout::entries(&state.layout.forms())? {
            let key = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            state.forms.insert(key, layout::read_record(&path.join(FormRecord::FILE))?);
        }
        for path in layout::entries(&state.layout.users())? {
            let record: UserRecord = layout::read_record(&path)?;
            state.users.insert(record.user.clone(), record);
        }
        for path in layout::entries(&state.layout.images())? {
            let record: ImageRecord = layout::read_record(&path)?;
            if state.forms.contains_key(&record.form) {
                state.images.insert((record.name.clone(), record.instance_type.name()), record);
            } else {
                tracing::warn!(
                    image = record.name,
                    "the files of this image are gone; it has to be pulled again"
                );
                layout::remove_file(&path)?;
            }
        }
        state.sweep_forms()?;
        Ok(state)
    }

    pub(crate) fn image(&self, name: &str, instance_type: InstanceType) -> Option<&ImageRecord> {
        self.images.get(&(name.to_owned(), instance_type.name()))
    }

    pub(crate) fn images(&self) -> impl Iterator<Item = &ImageRecord> {
        self.images.values()
    }

    pub(crate) fn form(&self, key: &str) -> Option<&FormRecord> {
        self.forms.get(key)
    }

    pub(crate) fn users(&self) -> Vec<InstanceId> {
        self.users.keys().cloned().collect()
    }

    pub(crate) fn describe(&self, image: &ImageRecord) -> StoredImage {
        let form = self.forms.get(&image.form);
        StoredImage {
            info: ImageInfo {
                size_bytes: form.map_or(0, |form| form.size_bytes),
                digest: image.digest.clone(),
                source: image.source.clone(),
                architecture: form.map(|form| form.architecture.clone()).unwrap_or_default(),
                form: form.map_or("", FormRecord::form_name).to_owned(),
                ..ImageInfo::file(&image.name, image.instance_type, 0, image.created_at)
            },
            last_used: image.last_used,
            users: self.users_of(&image.name, Some(image.instance_type)),
        }
    }

    fn users_of(&self, name: &str, instance_type: Option<InstanceType>) -> Vec<InstanceId> {
        let uses = |user: &&UserRecord| {
            user.uses.iter().any(|u| u.name == name && instance_type.is_none_or(|t| t == u.instance_type))
        };
        self.users.values().filter(uses).map(|user| user.user.clone()).collect()
    }

    /// Gives a name to a form that is there.
    pub(crate) fn insert_image(&mut self, record: ImageRecord) -> Result<StoredImage> {
        self.layout.write_record(&self.layout.images(), &record.file_name(), &record)?;
        let stored = self.describe(&record);
        let replaced = self.images.insert((record.name.clone(), record.instance_type.name()), record);
        if replaced.is_some() {
            self.sweep_forms()?;
        }
        Ok(stored)
    }

    /// Takes in a form that was made in `scratch`: everything in it is synced, read-only and recorded.
    pub(crate) fn insert_form(&mut self, key: &str, record: FormRecord, scratch: &Path) -> Result<()> {
        if self.forms.contains_key(key) {
            return Ok(());
        }
        let target = self.layout.form(key);
        fs::rename(scratch, &target).map_err(ImageError::io("create", &target))?;
        layout::sync_dir(&self.layout.forms())?;
        self.forms.insert(key.to_owned(), record);
        Ok(())
    }

    pub(crate) fn acquire(
        &mut self,
        name: &str,
        instance_type: InstanceType,
        user: &InstanceId,
    ) -> Result<LocalImage> {
        let mut record = self.users.get(user).cloned().unwrap_or_else(|| UserRecord {
            version: VERSION,
            user: user.clone(),
            uses: Vec::new(),
        });
        let held = record.uses.iter().find(|held| held.name == name && held.instance_type == instance_type);
        let key = match held {
            Some(held) => held.form.clone(),
            None => {
                let image = self.image(name, instance_type).ok_or_else(|| not_found(name, instance_type))?;
                let form = image.form.clone();
                record.uses.push(Use { name: name.to_owned(), instance_type, form: form.clone() });
                self.layout.write_record(&self.layout.users(), &format!("{user}.json"), &record)?;
                self.users.insert(user.clone(), record);
                self.touch(name, instance_type)?;
                form
            }
        };
        let dir = self.layout.form(&key);
        let form = self.forms.get(&key).ok_or_else(|| ImageError::Damaged {
            image: hv_types::validate::excerpt(name),
            path: dir.clone(),
            reason: "is gone".to_owned(),
        })?;
        Ok(LocalImage { digest: form.digest.clone(), content: form.content_in(&dir) })
    }

    pub(crate) fn release(&mut self, user: &InstanceId) -> Result<()> {
        let Some(record) = self.users.get(user).cloned() else { return Ok(()) };
        for held in &record.uses {
            self.touch(&held.name, held.instance_type)?;
        }
        layout::remove_file(&self.layout.users().join(format!("{user}.json")))?;
        layout::sync_dir(&self.layout.users())?;
        self.users.remove(user);
        self.sweep_forms()
    }

    fn touch(&mut self, name: &str, instance_type: InstanceType) -> Result<()> {
        let Some(image) = self.images.get_mut(&(name.to_owned(), instance_type.name())) else {
            return Ok(());
        };
        image.last_used = SystemTime::now();
        self.layout.write_record(&self.layout.images(), &image.file_name(), image)
    }

    /// Forgets a name for all types, unless an instance uses it.
    pub(crate) fn delete(&mut self, name: &str) -> Result<()> {
        let users = self.users_of(name, None);
        if !users.is_empty() {
            let mut named: Vec<_> = users.iter().take(MAX_NAMED_USERS).map(InstanceId::as_str).collect();
            let more = format!("{} more", users.len().saturating_sub(MAX_NAMED_USERS));
            if users.len() > MAX_NAMED_USERS {
                named.push(&more);
            }
            let image = hv_types::validate::excerpt(name);
            return Err(ImageError::InUse { image, users: named.join(", ") });
        }
        for instance_type in InstanceType::ALL {
            self.forget(name, instance_type)?;
        }
        self.sweep_forms()
    }

    /// Forgets one name for one type; its form goes with the next [`Self::sweep_forms`].
    pub(crate) fn forget(&mut self, name: &str, instance_type: InstanceType) -> Result<()> {
        if self.image(name, instance_type).is_some() {
            layout::remove_file(&self.layout.images().join(image_file_name(name, instance_type)))?;
            layout::sync_dir(&self.layout.images())?;
            self.images.remove(&(name.to_owned(), instance_type.name()));
        }
        Ok(())
    }

    /// Removes the forms that no name means, no instance uses and no pull has just made, with the blobs that
    /// only they had.
    pub(crate) fn sweep_forms(&mut self) -> Result<()> {
        let needed: HashSet<&str> = self
            .images
            .values()
            .map(|image| image.form.as_str())
            .chain(self.users.values().flat_map(|user| user.uses.iter().map(|held| held.form.as_str())))
            .chain(self.pins.keys().map(String::as_str))
            .collect();
        let unneeded: Vec<_> =
            self.forms.keys().filter(|key| !needed.contains(key.as_str())).cloned().collect();
        for key in unneeded {
            let from = self.layout.form(&key);
            let to = self.layout.tmp().join(&key);
            fs::rename(&from, &to).map_err(ImageError::io("remove", &from))?;
            layout::sync_dir(&self.layout.forms())?;
            let record = self.forms.remove(&key);
            fs::remove_dir_all(&to).map_err(ImageError::io("remove", &to))?;
            for digest in record.iter().flat_map(FormRecord::digests) {
                self.remove_blob(&digest)?;
            }
        }
        Ok(())
    }

    /// Removes a blob, unless a form has it too or a pull works with it.
    pub(crate) fn remove_blob(&self, digest: &Digest) -> Result<()> {
        let path = self.layout.blob(digest);
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.nlink() == 1 && !self.pins.contains_key(digest.as_str()) => {
                layout::remove_file(&path)
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn is_pinned(&self, what: &str) -> bool {
        self.pins.contains_key(what)
    }

    pub(crate) fn pin(&mut self, what: &str) {
        *self.pins.entry(what.to_owned()).or_default() += 1;
    }

    pub(crate) fn unpin(&mut self, what: &str) {
        if let Some(count) = self.pins.get_mut(what) {
            *count -= 1;
            if *count == 0 {
                self.pins.remove(what);
            }
        }
    }
}

pub(crate) fn not_found(name: &str, instance_type: InstanceType) -> ImageError {
    ImageError::NotFound { image: hv_types::validate::excerpt(name), instance_type }
}
