//! The handful of commands that can be run in a "running" instance.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use hv_driver::{Exec, ExecOutput, ExecRequest, Input, InstanceConfig, Result, TerminalSize};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// How many pieces of input and output wait.
const QUEUE: usize = 64;
/// How much `cat` passes on before it ends.
const MAX_CAT_BYTES: usize = 16 << 20;

/// Runs a command. With a terminal there is no standard error, and what is typed is echoed.
pub(crate) fn exec(request: ExecRequest, config: &InstanceConfig) -> Exec {
    let (input, typed) = mpsc::channel(QUEUE);
    let (output, printed) = mpsc::channel(QUEUE);
    let mut env = config.spec.env.clone();
    env.extend(request.env);
    let mut process =
        Process { env, host: config.name.clone(), input: typed, output: output.clone(), tty: request.tty };
    tokio::spawn(async move {
        let code = tokio::select! {
            code = process.run(&request.command) => code,
            // Nobody reads any more: the command ends, as the contract says.
            () = output.closed() => return,
        };
        let _ = output.send(Ok(ExecOutput::Exited { code })).await;
    });
    Exec { output: ReceiverStream::new(printed).boxed(), input }
}

struct Process {
    env: BTreeMap<String, String>,
    host: String,
    input: mpsc::Receiver<Input>,
    output: mpsc::Sender<Result<ExecOutput>>,
    tty: Option<TerminalSize>,
}

impl Process {
    async fn print(&self, text: String) -> i32 {
        // A terminal ends its lines with both.
        let text = if self.tty.is_some() { text.replace('\n', "\r\n") } else { text };
        let _ = self.output.send(Ok(ExecOutput::Stdout(text.into()))).await;
        0
    }

    async fn complain(&self, text: String) {
        let text = Bytes::from(text);
        let item = if self.tty.is_some() { ExecOutput::Stdout(text) } else { ExecOutput::Stderr(text) };
        let _ = self.output.send(Ok(item)).await;
    }

    async fn run(&mut self, command: &[String]) -> i32 {
        let words: Vec<_> = command.iter().map(String::as_str).collect();
        match words.as_slice() {
            ["sh", "-c", script] => self.script(script).await,
            words => self.one(words).await,
        }
    }

    /// Commands one after the other; that is all of a shell that there is.
    async fn script(&mut self, script: &str) -> i32 {
        let mut code = 0;
        for command in script.split(';') {
            let words: Vec<_> = command.split_whitespace().collect();
            match words.as_slice() {
                ["exit", with] => return with.parse().unwrap_or(2),
                ["read", _] => code = self.line().await,
                [] => {}
                words => code = self.one(words).await,
            }
        }
        code
    }

    async fn one(&mut self, words: &[&str]) -> i32 {
        match words {
            ["echo", rest @ .., ">&2"] => {
                self.complain(format!("{}\n", rest.join(" "))).await;
                0
            }
            ["echo", rest @ ..] => self.print(format!("{}\n", rest.join(" "))).await,
            ["env"] => {
                let all = self.env.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
                self.print(all).await
            }
            ["hostname"] => self.print(format!("{}\n", self.host)).await,
            ["stty", "size"] => match self.tty {
                Some(size) => self.print(format!("{} {}\n", size.height, size.width)).await,
                None => {
                    self.complain("stty: standard input is not a terminal\n".to_owned()).await;
                    1
                }
            },
            ["true"] => 0,
            ["false"] => 1,
            ["exit", code] => code.parse().unwrap_or(2),
            ["sleep", seconds] => {
                tokio::time::sleep(Duration::from_secs(seconds.parse().unwrap_or(0))).await;
                0
            }
            ["cat"] => self.cat().await,
            words => {
                let name = words.first().copied().unwrap_or_default();
                self.complain(format!("{name}: not found\n")).await;
                127
            }
        }
    }

    /// What is typed, as the command sees it; `None` at its end.
    async fn typed(&mut self) -> Option<Bytes> {
        loop {
            match self.input.recv().await? {
                Input::Eof => return None,
                Input::Resize(size) if self.tty.is_some() => self.tty = Some(size),
                Input::Resize(_) => {}
                Input::Data(bytes) => {
                    if self.tty.is_some() {
                        let _ = self.output.send(Ok(ExecOutput::Stdout(bytes.clone()))).await;
                    }
                    // What ends the input of a terminal is a character.
                    return (self.tty.is_none() || !bytes.contains(&4)).then_some(bytes);
                }
            }
        }
    }

    async fn line(&mut self) -> i32 {
        while let Some(bytes) = self.typed().await {
            if bytes.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
                return 0;
            }
        }
        1
    }

    async fn cat(&mut self) -> i32 {
        let mut passed = 0;
        while let Some(bytes) = self.typed().await {
            passed += bytes.len();
            if passed > MAX_CAT_BYTES {
                break;
            }
            let _ = self.output.send(Ok(ExecOutput::Stdout(bytes))).await;
        }
        0
    }
}
