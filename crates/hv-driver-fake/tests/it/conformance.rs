//! The fake against the conformance suite.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use hv_driver::conformance::Subject;
use hv_driver::{Driver, Exit, InstanceConfig};
use hv_driver_fake::{ANNOTATION_PREFIX, FakeDriver, FakeOptions, Phase, read_record};
use hv_types::{InstanceId, InstanceSpec};

struct FakeSubject {
    dir: tempfile::TempDir,
    last: Mutex<Option<Arc<FakeDriver>>>,
}

async fn setup() -> Option<FakeSubject> {
    Some(FakeSubject { dir: tempfile::tempdir().unwrap(), last: Mutex::default() })
}

impl FakeSubject {
    fn options(&self) -> FakeOptions {
        FakeOptions { state_dir: self.dir.path().to_owned(), ..FakeOptions::default() }
    }
}

#[async_trait]
impl Subject for FakeSubject {
    fn driver(&self) -> Arc<dyn Driver> {
        let driver = Arc::new(FakeDriver::new(self.options()));
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
        let record = hv_driver_fake::Record {
            config: config.clone(),
            phase: Phase::Creating,
            starts: 0,
            attempts: Default::default(),
        };
        let path = self.dir.path().join(format!("{}.json", config.id));
        std::fs::write(path, serde_json::to_vec(&record).unwrap()).unwrap();
    }

    async fn kill(&self, id: &InstanceId) {
        let driver = self.last.lock().unwrap().clone().unwrap();
        driver.end_guest(id, Exit::Failed("killed".to_owned())).unwrap();
    }

    fn copies(&self, id: &InstanceId) -> usize {
        match read_record(self.dir.path(), id).unwrap().map(|record| record.phase) {
            Some(Phase::Running { exit_at_ms: Some(at), .. }) => {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
                usize::from(now < Duration::from_millis(at))
            }
            Some(Phase::Running { .. } | Phase::Paused { .. }) => 1,
            Some(Phase::Creating | Phase::Stopped(_)) | None => 0,
        }
    }

    fn leftovers(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.dir.path()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name != ".ledger.jsonl").collect();
        names.sort();
        names
    }
}

hv_driver::driver_conformance!(setup);
