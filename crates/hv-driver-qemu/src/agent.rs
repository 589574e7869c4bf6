//! The way to the agent in a guest: a socket of QEMU's. It serves one client at a time.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hv_driver::{DriverError, Exec, ExecRequest, Result};
use hv_machine::guest_agent::{self, GuestAgent, Trouble};
use hv_types::InstanceId;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use crate::NAME;
use crate::files::AGENT_SOCKET;
use crate::machine::Machine;
use crate::problem::{Outcome, Problem};

/// How long a guest without an agent is waited for.
const SYNC_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the agent may take to answer a request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// The longest answer: 16 MiB of output for each stream, in base64, and what is around it.
const MAX_ANSWER_BYTES: u64 = 48 << 20;

/// Starts a command. What it prints comes at its end.
pub(crate) async fn exec(machine: Arc<Machine>, request: ExecRequest) -> Result<Exec> {
    let id = machine.id.clone();
    guest_agent::exec(NAME, &id, Guest(machine), request).await
}

struct Guest(Arc<Machine>);

#[async_trait]
impl GuestAgent for Guest {
    async fn ask(&self, command: &'static str, arguments: Value) -> std::result::Result<Value, Trouble> {
        let _turn = self.0.agent.lock().await;
        let mut agent = Agent::connect(&self.0).await.map_err(|problem| Trouble::Silent(problem.into()))?;
        agent.request(command, arguments).await.map_err(|problem| match problem {
            Problem::Refused { reason, .. } => Trouble::Refused(reason),
            other => Trouble::Failed(DriverError::failed(&self.0.id, "exec", other)),
        })
    }
}

struct Agent {
    stream: BufReader<UnixStream>,
}

impl Agent {
    /// Connects, and makes sure that answers to earlier clients are not taken for ours (`guest-sync-delimited`).
    async fn connect(machine: &Machine) -> Outcome<Self> {
        let socket = machine.dir.socket(AGENT_SOCKET);
        let stream = UnixStream::connect(&socket).await.map_err(Problem::file("connect to", &socket))?;
        let mut agent = Self { stream: BufReader::new(stream) };
        tokio::time::timeout(SYNC_TIMEOUT, agent.synchronise(&machine.id))
            .await
            .map_err(|_| timed_out("its greeting"))??;
        Ok(agent)
    }

    async fn synchronise(&mut self, id: &InstanceId) -> Outcome<()> {
        let io =
            |source| Problem::File { action: "talk to the guest agent of", path: id.as_str().into(), source };
        let number = crate::files::now_ms();
        let line = json!({ "execute": "guest-sync-delimited", "arguments": { "id": number } });
        // The delimiter first makes the guest's parser drop half a request of an earlier client.
        self.stream
            .get_mut()
            .write_all(&[&[0xff], line.to_string().as_bytes(), b"\n"].concat())
            .await
            .map_err(io)?;
        loop {
            let mut skipped = Vec::new();
            let length =
                (&mut self.stream).take(MAX_ANSWER_BYTES).read_until(0xff, &mut skipped).await.map_err(io)?;
            if length == 0 {
                return Err(Problem::Disconnected("the guest agent's greeting".to_owned()));
            }
            if self.line("guest-sync-delimited").await? == number {
                return Ok(());
            }
        }
    }

    async fn request(&mut self, name: &str, arguments: Value) -> Outcome<Value> {
        let line = format!("{}\n", json!({ "execute": name, "arguments": arguments }));
        let work = async {
            let sent = self.stream.get_mut().write_all(line.as_bytes()).await;
            sent.map_err(|_| Problem::Disconnected(name.to_owned()))?;
            self.line(name).await
        };
        tokio::time::timeout(ANSWER_TIMEOUT, work).await.map_err(|_| timed_out(name))?
    }

    async fn line(&mut self, name: &str) -> Outcome<Value> {
        let mut line = Vec::new();
        let read = (&mut self.stream).take(MAX_ANSWER_BYTES).read_until(b'\n', &mut line).await;
        if read.map_err(|e| Problem::Garbled(e.to_string()))? == 0 {
            return Err(Problem::Disconnected(name.to_owned()));
        }
        let answer: Value = serde_json::from_slice(&line).map_err(|e| Problem::Garbled(e.to_string()))?;
        match answer.get("return") {
            Some(value) => Ok(value.clone()),
            None => Err(Problem::Refused {
                command: name.to_owned(),
                reason: answer["error"]["desc"].as_str().unwrap_or("no reason given").to_owned(),
            }),
        }
    }
}

fn timed_out(what: &str) -> Problem {
    Problem::Timeout { what: format!("{what} by the guest agent"), timeout_ms: 15_000 }
}
