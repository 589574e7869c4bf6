//! What a log record looks like.

use std::io::Write;
use std::sync::{Arc, Mutex};

use hv_telemetry::{LogFormat, LogLevel, LogOptions, RequestId, subscriber};
use tracing_subscriber::fmt::MakeWriter;

#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Captured {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

fn captured(level: LogLevel, format: LogFormat, record: impl FnOnce()) -> Vec<String> {
    let written = Captured::default();
    let subscriber = subscriber(LogOptions { level, format }, false, written.clone());
    tracing::subscriber::with_default(subscriber, record);
    let bytes = written.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn a_json_record_is_one_object_with_its_fields_and_a_utc_timestamp() {
    let lines = captured(LogLevel::Info, LogFormat::Json, || {
        tracing::info!(instance = "vm-1", attempt = 2, "started\nwell");
    });
    assert_eq!(lines.len(), 1);
    let record: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
    assert_eq!(record["level"], "INFO");
    assert_eq!(record["message"], "started\nwell");
    assert_eq!(record["instance"], "vm-1");
    assert_eq!(record["attempt"], 2);
    let timestamp = record["timestamp"].as_str().unwrap();
    let shape: String = timestamp.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00T00:00:00.000000Z");
}

#[test]
fn a_record_carries_the_request_id_around_it() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let lines = captured(LogLevel::Info, LogFormat::Json, || {
        let id: RequestId = "abc-1".parse().unwrap();
        runtime.block_on(id.scope(async { tracing::info!("inside") }));
    });
    let record: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
    assert_eq!(record["span"]["request_id"], "abc-1");
}

#[test]
fn records_below_the_level_and_noise_are_left_out() {
    let lines = captured(LogLevel::Debug, LogFormat::Text, || {
        tracing::trace!("too fine");
        tracing::debug!("shown");
        tracing::info!(target: "h2::codec", "noise");
        tracing::warn!(target: "h2::codec", "a warning");
        tracing::debug!(target: "hypervisor_agent", "own");
    });
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert!(lines[0].contains("DEBUG") && lines[0].contains("shown"), "{lines:?}");
    assert!(lines[2].contains("own"), "{lines:?}");
}
