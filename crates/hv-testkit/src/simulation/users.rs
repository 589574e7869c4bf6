//! What users ask for: the real client against any server, often with a request key, and then often again.

use std::sync::Arc;
use std::time::Duration;

use hv_client::{Clients, ComputeClient};
use hv_proto::v1;
use parking_lot::Mutex;
use tonic::Status;

use super::checker::Asked;
use super::history::History;

/// How long a user waits for an answer.
const PATIENCE: Duration = Duration::from_secs(4);
/// The annotation-free image that the fake driver has.
const IMAGE: &str = "tiny";

/// What is asked of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    Start,
    Stop,
    Restart,
    Pause,
    Resume,
    Delete { force: bool },
}

/// What is asked of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AskNode {
    Cordon,
    Drain,
    Uncordon,
}

/// The users.
#[derive(Clone)]
pub(crate) struct Users {
    /// One for each server.
    pub(crate) clients: Arc<Vec<Clients>>,
    pub(crate) asked: Arc<Mutex<Asked>>,
    pub(crate) history: History,
    /// Instances that users know of: id and name.
    pub(crate) known: Arc<Mutex<Vec<(String, String)>>>,
    /// Cloned by each who waits for an answer.
    pub(crate) waiting: Arc<()>,
}

async fn patient<T>(call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded("the user went away")),
    }
}

impl Users {
    /// Whether somebody waits for an answer; every clone counts as one.
    pub(crate) fn are_waiting(&self) -> bool {
        Arc::strong_count(&self.waiting) > 1
    }

    fn compute(&self, server: usize) -> ComputeClient {
        self.clients[server].compute()
    }

    /// Creates through these servers, one after the other, with one key.
    pub(crate) async fn create(self, name: String, cores: u32, failover: bool, servers: Vec<usize>) {
        let key = format!("create-{name}");
        self.asked.lock().names.entry(name.clone()).or_default().insert(key.clone());
        let failover_policy = if failover { v1::FailoverPolicy::Restart } else { v1::FailoverPolicy::Never };
        let request = v1::CreateInstanceRequest {
            name: name.clone(),
            r#type: v1::InstanceType::Vm.into(),
            spec: Some(v1::InstanceSpec {
                image: IMAGE.into(),
                cpu_cores: i32::try_from(cores).unwrap_or(1),
                memory_bytes: 64 << 20,
                ..Default::default()
            }),
            request_key: key.clone(),
            failover_policy: failover_policy.into(),
            ..Default::default()
        };
        for server in servers {
            let answer = patient(self.compute(server).create_instance(request.clone())).await;
            self.told(&key, server, &answer);
            if let Ok(instance) = answer {
                {
                    let mut known = self.known.lock();
                    if !known.iter().any(|(id, _)| *id == instance.id) {
                        known.push((instance.id.clone(), name.clone()));
                    }
                }
                self.asked.lock().acknowledged.push(instance.id.clone());
                self.look(&instance.id, (server + 1) % self.clients.len()).await;
            }
        }
    }

    /// Asks something of an instance through these servers, one after the other, with one key.
    pub(crate) async fn ask(self, id: String, ask: Ask, key: String, servers: Vec<usize>) {
        {
            let mut asked = self.asked.lock();
            asked.mutations.entry(id.clone()).or_default().insert(key.clone());
            if let Ask::Delete { force } = ask {
                asked.deletions.insert(id.clone());
                if force {
                    asked.forced.insert(id.clone());
                }
            }
        }
        for server in servers {
            let mut client = self.compute(server);
            let (instance_id, request_key) = (id.clone(), key.clone());
            let answer = match ask {
                Ask::Start => {
                    patient(client.start_instance(v1::StartInstanceRequest { instance_id, request_key }))
                        .await
                }
                Ask::Stop => {
                    let request = v1::StopInstanceRequest {
                        instance_id,
                        request_key,
                        force: false,
                        timeout_seconds: 1,
                    };
                    patient(client.stop_instance(request)).await
                }
                Ask::Restart => {
                    let request = v1::RestartInstanceRequest { instance_id, request_key, force: true };
                    patient(client.restart_instance(request)).await
                }
                Ask::Pause => {
                    patient(client.pause_instance(v1::PauseInstanceRequest { instance_id, request_key }))
                        .await
                }
                Ask::Resume => {
                    patient(client.resume_instance(v1::ResumeInstanceRequest { instance_id, request_key }))
                        .await
                }
                Ask::Delete { force } => {
                    let request = v1::DeleteInstanceRequest { instance_id, request_key, force };
                    patient(client.delete_instance(request)).await.map(|_| v1::Instance::default())
                }
            };
            self.told(&key, server, &answer);
        }
        self.look(&id, key.len() % self.clients.len()).await;
    }

    /// Reads an acknowledged instance: it is shown from then on, until it is removed, and not any more after that.
    async fn look(&self, id: &str, server: usize) {
        let was_removed = self.asked.lock().removed.contains(id);
        let request = v1::GetInstanceRequest { instance_id: id.to_owned() };
        match patient(self.compute(server).get_instance(request)).await {
            Ok(_) if was_removed => {
                self.history
                    .violation(3, format_args!("server {server} shows {id}, which was removed before"));
            }
            Err(status)
                if status.code() == tonic::Code::NotFound && !self.asked.lock().deletions.contains(id) =>
            {
                self.history.violation(
                    3,
                    format_args!("server {server} does not show {id}, which was acknowledged before"),
                );
            }
            Ok(_) | Err(_) => {}
        }
    }

    /// What was answered to a key; it must be what was answered before.
    fn told(&self, key: &str, server: usize, answer: &Result<v1::Instance, Status>) {
        match answer {
            Err(status) => {
                self.history.note(format_args!(
                    "{key} through {server}: {:?} {}",
                    status.code(),
                    status.message()
                ));
            }
            Ok(instance) => {
                self.history.note(format_args!(
                    "{key} through {server}: answered {} at {}",
                    instance.id, instance.revision
                ));
                let mut asked = self.asked.lock();
                let before = asked
                    .answers
                    .entry(key.to_owned())
                    .or_insert_with(|| (instance.id.clone(), instance.clone()));
                if before.1 != *instance {
                    self.history.violation(
                        4,
                        format_args!(
                            "{key} was answered {:?}, and before {:?}",
                            brief(instance),
                            brief(&before.1)
                        ),
                    );
                }
            }
        }
    }

    /// Asks something of a node.
    pub(crate) async fn ask_node(self, node_id: String, ask: AskNode, server: usize) {
        let mut client = self.clients[server].cluster();
        let request_key = String::new();
        let answer = match ask {
            AskNode::Cordon => {
                patient(client.cordon_node(v1::CordonNodeRequest { node_id, request_key })).await.map(drop)
            }
            AskNode::Uncordon => {
                patient(client.uncordon_node(v1::UncordonNodeRequest { node_id, request_key }))
                    .await
                    .map(drop)
            }
            AskNode::Drain => {
                let request = v1::DrainNodeRequest {
                    node_id,
                    request_key,
                    discard_local_disks: true,
                    ..Default::default()
                };
                patient(client.drain_node(request)).await.map(drop)
            }
        };
        self.history
            .note(format_args!("{ask:?} through {server}: {:?}", answer.map_err(|status| status.code())));
    }

    /// What a server says there is: ids with their states.
    pub(crate) async fn list(self, server: usize) -> Result<Vec<(String, i32)>, Status> {
        let mut client = self.compute(server);
        let mut found = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = v1::ListInstancesRequest { page_size: 3, page_token, ..Default::default() };
            let page = patient(client.list_instances(request)).await?;
            if page.instances.len() > 3 {
                self.history.violation(7, format_args!("a page of 3 has {} instances", page.instances.len()));
            }
            found.extend(page.instances.into_iter().map(|instance| (instance.id.clone(), instance.state)));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(found);
            }
        }
    }
}

fn brief(instance: &v1::Instance) -> (String, u64, i32, i64) {
    (
        instance.id.clone(),
        instance.generation,
        instance.state,
        i64::try_from(instance.revision).unwrap_or(i64::MAX),
    )
}
