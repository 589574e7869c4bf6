//! The way to the agent in a guest: through libvirtd, which passes one command at a time on.

use std::sync::Arc;

use async_trait::async_trait;
use hv_driver::{Exec, ExecRequest, Result};
use hv_machine::guest_agent::{self, GuestAgent, Trouble};
use serde_json::{Value, json};

use crate::NAME;
use crate::machine::Machine;
use crate::problem::{Outcome, Problem};

/// How long the agent may take to answer a request, in seconds.
const ANSWER_TIMEOUT_S: i32 = 15;

/// Starts a command. What it prints comes at its end.
pub(crate) async fn exec(machine: Arc<Machine>, request: ExecRequest) -> Result<Exec> {
    let id = machine.id.clone();
    guest_agent::exec(NAME, &id, Guest(machine), request).await
}

struct Guest(Arc<Machine>);

#[async_trait]
impl GuestAgent for Guest {
    async fn ask(&self, command: &'static str, arguments: Value) -> std::result::Result<Value, Trouble> {
        ask(&self.0, command, arguments).await.map_err(|problem| match problem {
            silent if silent.is_agent_silent() => Trouble::Silent(silent.into()),
            // The agent's own words; others are libvirtd's.
            Problem::Refused { message, .. } if message.contains(command) => Trouble::Refused(message),
            other => Trouble::Failed(self.0.failed("exec")(other)),
        })
    }
}

async fn ask(machine: &Machine, name: &'static str, arguments: Value) -> Outcome<Value> {
    let command = json!({ "execute": name, "arguments": arguments }).to_string();
    let daemon = machine.daemon().await?;
    let answer = daemon.agent(&machine.stored().domain(), &command, ANSWER_TIMEOUT_S).await?;
    let answer: Value = serde_json::from_str(&answer).map_err(|e| Problem::Garbled(name, e.into()))?;
    Ok(answer["return"].clone())
}
