//! The fake against the conformance suite.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use hv_driver::conformance::{Counter, Grows, Measured, Subject};
use hv_driver::{
    Capability, Driver, Exit, ImageContent, InstanceConfig, LocalImage, SnapshotRequest, Storage,
};
use hv_driver_fake::{
    ALWAYS, ANNOTATION_PREFIX, CAPABILITIES, FakeDriver, FakeOptions, MAX_LOG_BYTES, Phase, Script, Step,
    read_record,
};
use hv_types::instance::{NetworkSpec, VolumeMount};
use hv_types::{InstanceId, InstanceSpec};

struct FakeSubject {
    dir: tempfile::TempDir,
    second: tempfile::TempDir,
    capabilities: Vec<Capability>,
    last: Mutex<Option<Arc<FakeDriver>>>,
}

async fn setup() -> Option<FakeSubject> {
    Some(FakeSubject::able(CAPABILITIES.to_vec()))
}

impl FakeSubject {
    fn able(capabilities: Vec<Capability>) -> Self {
        let (dir, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        Self { dir, second, capabilities, last: Mutex::default() }
    }

    fn options(&self, dir: &Path) -> FakeOptions {
        let capabilities = self.capabilities.clone();
        let images = ["tiny", "rescue"].map(str::to_owned).to_vec();
        FakeOptions { state_dir: dir.to_owned(), capabilities, images, ..FakeOptions::default() }
    }

    fn numbers(&self, what: &str) -> Option<Counter> {
        Some(Counter {
            spec: self.spec(),
            ask: format!("!{what}\n"),
            answer: format!("{what}="),
            grows: Grows::WhenAsked,
        })
    }
}

fn copies_in(dir: &Path, id: &InstanceId) -> usize {
    match read_record(dir, id).unwrap().map(|record| record.phase) {
        Some(Phase::Running { exit_at_ms: Some(at), .. }) => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            usize::from(now < Duration::from_millis(at))
        }
        Some(Phase::Running { .. } | Phase::Paused { .. }) => 1,
        Some(Phase::Creating | Phase::Stopped(_)) | None => 0,
    }
}

fn files_in(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != ".ledger.jsonl").collect()
}

#[async_trait]
impl Subject for FakeSubject {
    fn driver(&self) -> Arc<dyn Driver> {
        let driver = Arc::new(FakeDriver::new(self.options(self.dir.path())));
        *self.last.lock().unwrap() = Some(driver.clone());
        driver
    }

    fn spec(&self) -> InstanceSpec {
        InstanceSpec {
            image: "tiny".to_owned(),
            cpu_cores: 1,
            memory_bytes: 64 << 20,
            ..InstanceSpec::default()
        }
    }

    fn greeting(&self) -> &str {
        "fake-guest: hello"
    }

    fn make_short_lived(&self, config: &mut InstanceConfig) {
        config.metadata.annotations.insert(format!("{ANNOTATION_PREFIX}exit-after"), "100ms".to_owned());
    }

    fn leave_half_created(&self, config: &InstanceConfig) {
        let record = hv_driver_fake::Record::creating(config);
        let path = self.dir.path().join(format!("{}.json", config.id));
        std::fs::write(path, serde_json::to_vec(&record).unwrap()).unwrap();
    }

    async fn kill(&self, id: &InstanceId) {
        let driver = self.last.lock().unwrap().clone().unwrap();
        driver.end_guest(id, Exit::Failed("killed".to_owned())).unwrap();
    }

    fn copies(&self, id: &InstanceId) -> usize {
        copies_in(self.dir.path(), id) + copies_in(self.second.path(), id)
    }

    fn leftovers(&self) -> Vec<String> {
        let mut names = files_in(self.dir.path());
        names.extend(files_in(self.second.path()));
        names.sort();
        names
    }

    fn is_in_table(&self) -> bool {
        self.capabilities.len() == CAPABILITIES.len()
    }

    fn volume(&self) -> Option<VolumeMount> {
        Some(VolumeMount { name: "data".to_owned(), mount_path: "/data".to_owned(), read_only: true })
    }

    fn second_driver(&self) -> Option<Arc<dyn Driver>> {
        Some(Arc::new(FakeDriver::new(self.options(self.second.path()))))
    }

    fn storage(&self) -> Vec<Storage> {
        vec![Storage::Shared, Storage::Copied]
    }

    fn counter(&self) -> Option<Counter> {
        self.numbers("count")
    }

    fn disk_counter(&self) -> Option<Counter> {
        self.numbers("disk")
    }

    fn shell(&self) -> Option<InstanceSpec> {
        Some(self.spec())
    }

    fn kernel(&self) -> Option<InstanceSpec> {
        Some(InstanceSpec { image: String::new(), kernel: "vmlinuz".to_owned(), ..self.spec() })
    }

    fn network(&self) -> Option<NetworkSpec> {
        Some(NetworkSpec { network_id: "other".to_owned(), ..NetworkSpec::default() })
    }

    fn rescue_image(&self) -> Option<(String, String)> {
        Some(("rescue".to_owned(), "fake-rescue: hello from rescue".to_owned()))
    }

    fn local_image(&self) -> Option<LocalImage> {
        // Any file will do: it is not looked into.
        let path = std::env::current_exe().unwrap();
        Some(LocalImage {
            digest: format!("sha256:{}", "0".repeat(64)),
            content: ImageContent::Kernel { path },
        })
    }

    async fn leave_half_snapshot(&self, id: &InstanceId, name: &str) -> bool {
        let driver = FakeDriver::new(self.options(self.dir.path()));
        let snapshot = Step { hang: ALWAYS, ..Step::default() };
        driver.set_script(Script { snapshot, ..Script::default() });
        let request = SnapshotRequest { name: name.to_owned(), memory: false };
        tokio::time::timeout(Duration::from_millis(50), driver.snapshot(id, &request)).await.is_err()
    }

    fn log_bound(&self) -> Option<u64> {
        Some(MAX_LOG_BYTES)
    }

    async fn measured(&self, id: &InstanceId) -> Option<Measured> {
        let spec = read_record(self.dir.path(), id).unwrap()?.config.spec;
        let mut disks: Vec<_> =
            spec.disks.iter().filter(|disk| !disk.boot).map(|disk| disk.size_bytes).collect();
        disks.sort_unstable();
        let (cpu_cores, memory_bytes) = (Some(spec.cpu_cores), Some(spec.memory_bytes));
        Some(Measured { cpu_cores, memory_bytes, disks: Some(disks) })
    }
}

hv_driver::driver_conformance!(setup);

mod least {
    //! A fake that was told to be able to do little: what it refuses, and how.

    use super::{Capability, FakeSubject};

    async fn setup() -> Option<FakeSubject> {
        use Capability::{Console, Logs, Pause};
        Some(FakeSubject::able(vec![Pause, Console, Logs]))
    }

    hv_driver::driver_conformance!(setup);
}
