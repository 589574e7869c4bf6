//! Asking for instances, and waiting for what was asked.

use anyhow::{Result, bail};
use hv_client::ComputeClient;
use hv_proto::v1;
use tonic::Code;

use crate::probe::until;

/// A small virtual machine from the guest image.
#[must_use]
pub fn create_request(name: &str) -> v1::CreateInstanceRequest {
    v1::CreateInstanceRequest {
        name: name.into(),
        r#type: v1::InstanceType::Vm.into(),
        spec: Some(v1::InstanceSpec {
            image: "tiny".into(),
            cpu_cores: 1,
            memory_bytes: 128 << 20,
            ..v1::InstanceSpec::default()
        }),
        ..v1::CreateInstanceRequest::default()
    }
}

/// A change of what is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Run it.
    Start,
    /// Stop it; the guest gets one second.
    Stop,
    /// Remove it.
    Delete,
}

impl Ask {
    /// Asks until the answer is known: a server that dies in the middle is asked again with the same key.
    ///
    /// # Errors
    /// The server refuses, or stays away.
    pub async fn send(self, client: &ComputeClient, instance_id: &str, key: &str) -> Result<()> {
        until(&format!("an answer to {self:?}"), async || {
            let mut client = client.clone();
            let (instance_id, request_key) = (instance_id.to_owned(), key.to_owned());
            let answer = match self {
                Self::Start => {
                    let request = v1::StartInstanceRequest { instance_id, request_key };
                    client.start_instance(request).await.map(drop)
                }
                Self::Stop => {
                    let request = v1::StopInstanceRequest {
                        instance_id,
                        request_key,
                        force: false,
                        timeout_seconds: 1,
                    };
                    client.stop_instance(request).await.map(drop)
                }
                Self::Delete => {
                    let request = v1::DeleteInstanceRequest { instance_id, request_key, force: false };
                    client.delete_instance(request).await.map(drop)
                }
            };
            match answer {
                Ok(()) => Ok(Some(())),
                Err(status) if self == Self::Delete && status.code() == Code::NotFound => Ok(Some(())),
                Err(status) => Err(status.into()),
            }
        })
        .await
    }
}

/// Waits until an instance is settled in `state`.
///
/// # Errors
/// It settles in another state, or not at all.
pub async fn until_settled(
    client: &ComputeClient,
    id: &str,
    state: v1::InstanceState,
) -> Result<v1::Instance> {
    let mut seen = String::new();
    let settled = until(&format!("instance {id} to be {}", state.as_str_name()), async || {
        let request = v1::GetInstanceRequest { instance_id: id.to_owned() };
        let instance = client.clone().get_instance(request).await?.into_inner();
        seen = format!("{} ({})", instance.state().as_str_name(), instance.state_reason);
        let done = instance.observed_generation >= instance.generation;
        if done && instance.state() == v1::InstanceState::Failed && state != v1::InstanceState::Failed {
            return Ok(Some(instance));
        }
        Ok((done && instance.state() == state).then_some(instance))
    })
    .await
    .map_err(|error| error.context(format!("last seen {seen}")))?;
    if settled.state() != state {
        bail!("instance {id} is {seen} instead of {}", state.as_str_name());
    }
    Ok(settled)
}

/// Waits until an instance does not exist any more.
///
/// # Errors
/// It still does.
pub async fn until_gone(client: &ComputeClient, id: &str) -> Result<()> {
    until(&format!("instance {id} to be gone"), async || {
        let request = v1::GetInstanceRequest { instance_id: id.to_owned() };
        match client.clone().get_instance(request).await {
            Err(status) if status.code() == Code::NotFound => Ok(Some(())),
            Err(status) => Err(status.into()),
            Ok(_) => Ok(None),
        }
    })
    .await
}
