//! A driver where it runs nothing: it is there, says why it does nothing, and refuses everything.

use std::marker::PhantomData;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hv_driver::{
    Console, Display, Driver, DriverError, DriverEvent, Exec, ExecRequest, Fingerprint, Handle,
    InstanceConfig, LogRequest, Observed, Result, Stats, StopMode,
};
use hv_types::{ImageInfo, InstanceId, InstanceType};

/// Which driver is absent, and why. Fulfilled by its options, which it takes all the same.
pub trait Absence: 'static {
    /// The driver's name.
    const NAME: &'static str;
    /// What it would run.
    const INSTANCE_TYPE: InstanceType;
    /// Why it does not, with the remedy.
    const REASON: &'static str = "it runs on Linux only; run the agent on a Linux node";
}

/// A driver that refuses everything. It has nothing, so there is nothing to find and nothing to delete.
pub struct Absent<O>(PhantomData<fn(O)>);

impl<O: Absence> Absent<O> {
    /// A driver.
    #[must_use]
    pub fn new(_options: O) -> Self {
        Self(PhantomData)
    }
}

fn unavailable<O: Absence, T>() -> Result<T> {
    Err(DriverError::Unavailable { driver: O::NAME, reason: O::REASON.to_owned() })
}

#[async_trait]
impl<O: Absence> Driver for Absent<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn instance_type(&self) -> InstanceType {
        O::INSTANCE_TYPE
    }

    async fn fingerprint(&self) -> Fingerprint {
        Fingerprint {
            healthy: false,
            version: String::new(),
            message: O::REASON.to_owned(),
            capabilities: Vec::new(),
            images_are_local: true,
        }
    }

    async fn images(&self) -> Result<Vec<ImageInfo>> {
        Ok(Vec::new())
    }

    async fn create(&self, _config: &InstanceConfig) -> Result<Handle> {
        unavailable::<O, _>()
    }

    async fn start(&self, _id: &InstanceId) -> Result<Handle> {
        unavailable::<O, _>()
    }

    async fn stop(&self, _id: &InstanceId, _mode: StopMode) -> Result<()> {
        unavailable::<O, _>()
    }

    async fn pause(&self, _id: &InstanceId) -> Result<()> {
        unavailable::<O, _>()
    }

    async fn resume(&self, _id: &InstanceId) -> Result<()> {
        unavailable::<O, _>()
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
        unavailable::<O, _>()
    }

    async fn console(&self, _id: &InstanceId) -> Result<Console> {
        unavailable::<O, _>()
    }

    async fn exec(&self, _id: &InstanceId, _request: ExecRequest) -> Result<Exec> {
        unavailable::<O, _>()
    }

    async fn logs(
        &self,
        _id: &InstanceId,
        _request: LogRequest,
    ) -> Result<BoxStream<'static, Result<Bytes>>> {
        unavailable::<O, _>()
    }

    async fn display(&self, _id: &InstanceId) -> Result<Display> {
        unavailable::<O, _>()
    }
}
