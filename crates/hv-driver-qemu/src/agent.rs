//! Commands in a guest, through its agent (docs/interop/qemu-ga-ref of QEMU).
//!
//! # Caveats
//! The agent runs a command to its end and then tells its output; nothing can be typed meanwhile, and there is no
//! terminal. It serves one client at a time.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream;
use hv_driver::{DriverError, Exec, ExecOutput, ExecRequest, Input, Result};
use hv_types::InstanceId;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

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
/// How often the agent is asked whether a command has ended, at first and at last.
const POLL_INTERVAL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// How many inputs are taken before they are refused.
const INPUT_QUEUE: usize = 1;

/// Starts a command. What it prints comes at its end.
pub(crate) async fn exec(machine: Arc<Machine>, request: ExecRequest) -> Result<Exec> {
    let id = machine.id.clone();
    let unsupported = |reason: &str| DriverError::Unsupported {
        driver: NAME,
        operation: "exec",
        reason: reason.to_owned(),
    };
    if request.tty.is_some() {
        return Err(unsupported(
            "qemu's guest agent has no terminals; run it without one, or use the console",
        ));
    }
    let Some((program, arguments)) = request.command.split_first() else {
        return Err(unsupported("an empty command cannot be run"));
    };
    let environment: Vec<_> = request.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let mut start = json!({ "path": program, "arg": arguments, "capture-output": true });
    if !environment.is_empty() {
        start["env"] = environment.into();
    }
    let failed = |problem: Problem| DriverError::failed(&id, "exec", problem);
    let silent = |_| {
        let reason =
            "the guest agent does not answer; install qemu-guest-agent in the guest, or wait until it is up";
        DriverError::wrong_state(&id, "exec", reason)
    };
    let pid = {
        let _turn = machine.agent.lock().await;
        let mut agent = Agent::connect(&machine).await.map_err(silent)?;
        match agent.request("guest-exec", start).await {
            // What the agent says of a program that is not there; a shell would say 127.
            Err(Problem::Refused { reason, .. }) => return Ok(not_started(&reason)),
            other => other.map_err(failed)?["pid"].clone(),
        }
    };
    let (input, typed) = mpsc::channel(INPUT_QUEUE);
    let (output, printed) = mpsc::channel(4);
    tokio::spawn(async move {
        let work = async {
            tokio::select! {
                outputs = wait(&machine, &pid) => outputs.map_err(|problem| DriverError::failed(&id, "exec", problem)),
                () = refused_input(typed) => {
                    let reason = "qemu's guest agent passes no input on to a running command".to_owned();
                    Err(DriverError::Unsupported { driver: NAME, operation: "exec", reason })
                }
            }
        };
        let outputs = tokio::select! {
            outputs = work => outputs,
            // The agent cannot end a command; it runs to its end unheard.
            () = output.closed() => return,
        };
        match outputs {
            Ok(outputs) => {
                for item in outputs {
                    let _ = output.send(Ok(item)).await;
                }
            }
            Err(error) => {
                let _ = output.send(Err(error)).await;
            }
        }
    });
    let output =
        stream::unfold(printed, |mut printed| async { printed.recv().await.map(|item| (item, printed)) });
    Ok(Exec { output: output.boxed(), input })
}

fn not_started(reason: &str) -> Exec {
    let items = [ExecOutput::Stderr(format!("{reason}\n").into()), ExecOutput::Exited { code: 127 }];
    Exec { output: stream::iter(items.map(Ok)).boxed(), input: mpsc::channel(INPUT_QUEUE).0 }
}

/// Returns when something is typed; never if nothing is.
async fn refused_input(mut typed: mpsc::Receiver<Input>) {
    loop {
        match typed.recv().await {
            Some(Input::Data(bytes)) if !bytes.is_empty() => return,
            Some(_) => {}
            None => return std::future::pending().await,
        }
    }
}

async fn wait(machine: &Machine, pid: &Value) -> Outcome<Vec<ExecOutput>> {
    let (mut interval, longest) = POLL_INTERVAL;
    loop {
        let status = {
            let _turn = machine.agent.lock().await;
            let mut agent = Agent::connect(machine).await?;
            agent.request("guest-exec-status", json!({ "pid": pid })).await?
        };
        if status["exited"].as_bool() == Some(true) {
            return outputs(&status);
        }
        // The agent tells nothing by itself, so it is asked, ever more rarely.
        tokio::time::sleep(interval).await;
        interval = (interval * 2).min(longest);
    }
}

fn outputs(status: &Value) -> Outcome<Vec<ExecOutput>> {
    let decode = |name: &str| {
        let bytes = BASE64.decode(status[name].as_str().unwrap_or_default());
        bytes.map(Bytes::from).map_err(|e| Problem::Garbled(format!("{name}: {e}")))
    };
    let mut items = Vec::new();
    let (stdout, stderr) = (decode("out-data")?, decode("err-data")?);
    items.extend((!stdout.is_empty()).then_some(ExecOutput::Stdout(stdout)));
    items.extend((!stderr.is_empty()).then_some(ExecOutput::Stderr(stderr)));
    if status["out-truncated"] == true || status["err-truncated"] == true {
        items.push(ExecOutput::Stderr("(the guest agent cut the output at 16 MiB)\n".into()));
    }
    let number = |name: &str| status[name].as_i64().and_then(|n| i32::try_from(n).ok());
    let code = number("exitcode").or_else(|| number("signal").map(|signal| 128 + signal)).unwrap_or(-1);
    items.push(ExecOutput::Exited { code });
    Ok(items)
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
