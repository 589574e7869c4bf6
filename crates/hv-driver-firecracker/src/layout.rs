//! What becomes of an instance's disks when its configuration changes.

use std::path::Path;

use hv_types::{InstanceSpec, ResourceLimits};
use rustix::fs::OFlags;

use crate::create;
use crate::disks;
use crate::files::{CONFIG, NEXT, RUN, Stored, StoredDisk, StoredRun, open_in_root, remove_file};
use crate::machine::Machine;
use crate::problem::{Outcome, Problem};

impl Machine {
    /// What it will be when it is started.
    pub(crate) fn next(&self) -> Outcome<hv_driver::InstanceConfig> {
        Ok(self.dir.read(NEXT)?.unwrap_or_else(|| self.stored().config))
    }

    /// Makes an instance that does not run what its waiting change says; nothing if none waits. `change` is held. Begun
    /// again after a crash it ends the same.
    pub(crate) fn apply_next(&self) -> Outcome<()> {
        let Some(config) = self.dir.read::<hv_driver::InstanceConfig>(NEXT)? else { return Ok(()) };
        let (old, root) = (self.stored(), self.root());
        let disks = lay_out(&old, &config.spec, &root)?;
        let stored = Stored {
            cmdline: crate::boot_args::changed(&old.cmdline, &old.config.spec, &config.spec),
            config,
            disks,
            ..old.clone()
        };
        self.dir.write(CONFIG, &stored)?;
        for gone in old.disks.iter().filter(|disk| !stored.disks.iter().any(|kept| kept.file == disk.file)) {
            remove_file(&root.join(&gone.file))?;
        }
        self.set_stored(stored);
        // Whatever is loaded from now on, it is no longer what was tracked.
        if let Some(run) = self.dir.read::<StoredRun>(RUN)? {
            self.dir.note(RUN, &StoredRun { tracked_since: None, ..run })?;
        }
        self.dir.remove(NEXT)
    }
}

/// The disk that a planned one is.
fn known<'a>(old: &'a Stored, planned: &StoredDisk) -> Option<&'a StoredDisk> {
    let is_it = |known: &&StoredDisk| match planned.is_root {
        true => known.is_root,
        false => !known.is_root && known.name == planned.name,
    };
    old.disks.iter().find(is_it)
}

/// Which disk would lose something, and why that is refused.
pub(crate) fn shrinks(old: &Stored, spec: &InstanceSpec, root: &Path) -> Outcome<Option<String>> {
    let has_root = old.disks.iter().any(|disk| disk.is_root);
    for (planned, size) in create::plan(spec, has_root) {
        let Some(known) = known(old, &planned) else { continue };
        let has = create::size_of(&root.join(&known.file))?;
        // 0 keeps the boot disk as it is.
        if size.next_multiple_of(512) < has && !(planned.is_root && size == 0) {
            let name = &planned.name;
            return Ok(Some(format!(
                "spec.disks[{name}].size_bytes must be at least {has}: a disk only grows"
            )));
        }
    }
    Ok(None)
}

/// Makes what is missing, lets grow what is too small. What is too much goes when the new configuration is on disk.
fn lay_out(old: &Stored, spec: &InstanceSpec, root: &Path) -> Outcome<Vec<StoredDisk>> {
    let has_root = old.disks.iter().any(|disk| disk.is_root);
    let mut taken: Vec<String> = old.disks.iter().map(|disk| disk.file.clone()).collect();
    let mut laid_out = Vec::new();
    for (planned, size) in create::plan(spec, has_root) {
        if let Some(known) = known(old, &planned) {
            let path = root.join(&known.file);
            if create::size_of(&path)? < size {
                let grow = || open_in_root(&path, OFlags::WRONLY)?.set_len(size.next_multiple_of(512));
                grow().map_err(Problem::file("enlarge", &path))?;
            }
            laid_out.push(StoredDisk { name: planned.name, ..known.clone() });
            continue;
        }
        let free = (0..=taken.len()).map(|n| format!("disk{n}.raw")).find(|file| !taken.contains(file));
        let file = free.unwrap_or_else(|| planned.file.clone());
        disks::make_empty(&root.join(&file), size)?;
        taken.push(file.clone());
        laid_out.push(StoredDisk { file, ..planned });
    }
    Ok(laid_out)
}

/// What of the specification is in the files that were made at first, and was changed.
pub(crate) fn fixed_field(old: &InstanceSpec, new: &InstanceSpec) -> Option<&'static str> {
    let fields = [
        ("spec.image", old.image == new.image),
        ("spec.kernel", old.kernel == new.kernel),
        ("spec.initrd", old.initrd == new.initrd),
        ("spec.command", old.command == new.command),
        ("spec.args", old.args == new.args),
        ("spec.env", old.env == new.env),
        ("spec.working_dir", old.working_dir == new.working_dir),
    ];
    fields.into_iter().find(|(_, is_same)| !is_same).map(|(field, _)| field)
}

/// Whether a machine that runs is of the same make: what differs, if anything, can be told to it as it runs.
pub(crate) fn is_same_machine(old: &InstanceSpec, new: &InstanceSpec) -> bool {
    let fixed = |spec: &InstanceSpec| {
        let limits = spec.limits.unwrap_or_default();
        let limits = ResourceLimits { io_read_bps: 0, io_write_bps: 0, ..limits };
        // Without a card there is nothing by which to read it.
        let has_card = spec.network.is_some() || !spec.user_data.is_empty();
        let spec = InstanceSpec { limits: Some(limits), user_data: String::new(), ..spec.clone() };
        (spec, has_card)
    };
    fixed(old) == fixed(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_io_bounds_and_metadata_change_while_it_runs() {
        let old = InstanceSpec { cpu_cores: 1, user_data: "a".into(), ..InstanceSpec::default() };
        let io = ResourceLimits { io_read_bps: 1, ..ResourceLimits::default() };
        let cpu = ResourceLimits { cpu_quota: 1, ..ResourceLimits::default() };
        let cases = [
            (InstanceSpec { user_data: "b".into(), ..old.clone() }, true),
            (InstanceSpec { user_data: String::new(), ..old.clone() }, false),
            (InstanceSpec { limits: Some(io), ..old.clone() }, true),
            (InstanceSpec { limits: Some(cpu), ..old.clone() }, false),
            (InstanceSpec { cpu_cores: 2, ..old.clone() }, false),
            (InstanceSpec { kernel_args: "quiet".into(), ..old.clone() }, false),
        ];
        for (new, expected) in cases {
            assert_eq!(is_same_machine(&old, &new), expected, "{new:?}");
        }
    }
}
