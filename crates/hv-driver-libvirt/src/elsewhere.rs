//! The driver on systems on which it runs nothing.

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hv_driver::{
    Console, Display, Driver, DriverError, DriverEvent, Exec, ExecRequest, Fingerprint, Handle,
    InstanceConfig, LogRequest, Observed, Result, Stats, StopMode,
};
use hv_types::{ImageInfo, InstanceId, InstanceType};

use crate::{LibvirtOptions, NAME};

const REASON: &str =
    "this program was built without libvirt; build it with `make all-with-libvirt`, on Linux";

/// The driver, which refuses everything here.
pub struct LibvirtDriver;

impl LibvirtDriver {
    /// A driver.
    #[must_use]
    pub fn new(_options: LibvirtOptions) -> Self {
        Self
    }
}

fn unavailable<T>() -> Result<T> {
    Err(DriverError::Unavailable { driver: NAME, reason: REASON.to_owned() })
}

#[async_trait]
impl Driver for LibvirtDriver {
    fn name(&self) -> &'static str {
        NAME
    }

    fn instance_type(&self) -> InstanceType {
        InstanceType::Vm
    }

    async fn fingerprint(&self) -> Fingerprint {
        Fingerprint {
            healthy: false,
            version: String::new(),
            message: REASON.to_owned(),
            capabilities: Vec::new(),
            images_are_local: true,
        }
    }

    async fn images(&self) -> Result<Vec<ImageInfo>> {
        Ok(Vec::new())
    }

    async fn create(&self, _config: &InstanceConfig) -> Result<Handle> {
        unavailable()
    }

    async fn start(&self, _id: &InstanceId) -> Result<Handle> {
        unavailable()
    }

    async fn stop(&self, _id: &InstanceId, _mode: StopMode) -> Result<()> {
        unavailable()
    }

    async fn pause(&self, _id: &InstanceId) -> Result<()> {
        unavailable()
    }

    async fn resume(&self, _id: &InstanceId) -> Result<()> {
        unavailable()
    }

    async fn delete(&self, _id: &InstanceId) -> Result<()> {
        Ok(())
    }

    async fn recover(&self, _id: &InstanceId, _handle: Option<&Handle>) -> Result<Observed> {
        Ok(Observed::Absent)
    }

    async fn observe(&self, _id: &InstanceId) -> Result<Observed> {
        Ok(Observed::Absent)
    }

    async fn list(&self) -> Result<Vec<InstanceId>> {
        Ok(Vec::new())
    }

    fn events(&self) -> BoxStream<'static, DriverEvent> {
        stream::pending().boxed()
    }

    async fn stats(&self, _id: &InstanceId) -> Result<Stats> {
        unavailable()
    }

    async fn console(&self, _id: &InstanceId) -> Result<Console> {
        unavailable()
    }

    async fn exec(&self, _id: &InstanceId, _request: ExecRequest) -> Result<Exec> {
        unavailable()
    }

    async fn logs(
        &self,
        _id: &InstanceId,
        _request: LogRequest,
    ) -> Result<BoxStream<'static, Result<Bytes>>> {
        unavailable()
    }

    async fn display(&self, _id: &InstanceId) -> Result<Display> {
        unavailable()
    }
}
