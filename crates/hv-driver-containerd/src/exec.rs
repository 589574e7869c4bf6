//! Commands inside a running container, and what is typed into its console.
//!
//! A command's streams are pipes of names in the instance's directory, so that what a dead agent left is found and
//! ended by the next one.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use containerd_client::services::v1::{CloseIoRequest, ExecProcessRequest, ResizePtyRequest};
use futures::StreamExt as _;
use futures::stream;
use hv_driver::{DriverError, Exec, ExecOutput, ExecRequest, Input, TerminalSize};
use rustix::process::Signal;
use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::container::{Container, Done};
use crate::files::{EXEC, STDIN, make_pipe};
use crate::problem::{Outcome, Problem};
use crate::spec;

/// How many pieces of input and of output wait.
const QUEUE: usize = 64;
/// Most bytes of a piece.
const PIECE_BYTES: usize = 16 << 10;
/// How long typed bytes wait for a container that does not read before they are dropped.
const INPUT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often is looked whether typed bytes were taken. A pipe does not tell its writer.
const DRAIN_INTERVAL: Duration = Duration::from_millis(2);
/// What ends the input of a terminal: Ctrl-D.
const END_OF_INPUT: u8 = 4;

type Output = mpsc::Sender<hv_driver::Result<ExecOutput>>;

/// Where input goes.
struct Keyboard {
    container: Arc<Container>,
    /// Empty for the container's own process.
    exec_id: String,
    has_terminal: bool,
    pipe: Option<pipe::Sender>,
}

impl Keyboard {
    async fn take(&mut self, input: Input) {
        let client = &self.container.shared.client;
        let (container_id, exec_id) = (self.container.id.to_string(), self.exec_id.clone());
        match input {
            Input::Data(bytes) => self.write(&bytes).await,
            Input::Eof if self.has_terminal => self.write(&[END_OF_INPUT]).await,
            Input::Eof => {
                // What was typed before is read before the end is told.
                self.drained().await;
                let request = CloseIoRequest { container_id, exec_id, stdin: true };
                let _ = client.tasks().close_io(client.request(request)).await;
                self.pipe = None;
            }
            Input::Resize(TerminalSize { width, height }) => {
                let (width, height) = (u32::from(width), u32::from(height));
                let request = ResizePtyRequest { container_id, exec_id, width, height };
                // Without a terminal there is nothing to resize.
                let _ = client.tasks().resize_pty(client.request(request)).await;
            }
        }
    }

    /// Waits until the shim has taken what was typed, or does not any more.
    async fn drained(&self) {
        let Some(pipe) = &self.pipe else { return };
        let empty = async {
            while rustix::io::ioctl_fionread(pipe).is_ok_and(|bytes| bytes > 0) {
                tokio::time::sleep(DRAIN_INTERVAL).await;
            }
        };
        let _ = tokio::time::timeout(INPUT_TIMEOUT, empty).await;
    }

    async fn write(&mut self, bytes: &[u8]) {
        let Some(pipe) = &mut self.pipe else { return };
        if !matches!(tokio::time::timeout(INPUT_TIMEOUT, pipe.write_all(bytes)).await, Ok(Ok(()))) {
            tracing::debug!(instance = %self.container.id, "typed bytes were dropped: nobody reads them");
        }
    }
}

/// What is typed into a container's console goes where its process reads.
pub(crate) fn console_input(container: &Arc<Container>) -> Outcome<mpsc::Sender<Input>> {
    let (sender, mut typed) = mpsc::channel(QUEUE);
    if !spec::has_terminal(&container.stored().config) {
        // Its input is empty: who types hears that nobody listens.
        return Ok(sender);
    }
    let path = container.dir.file(STDIN);
    // With both ends, so that it never matters whether the shim has opened its own yet. The shim holds both as well:
    // the container's input does not end with whoever types.
    let pipe = pipe::OpenOptions::new().read_write(true).open_sender(&path);
    let pipe = pipe.map_err(Problem::file("open", &path))?;
    let mut keyboard = Keyboard {
        container: container.clone(),
        exec_id: String::new(),
        has_terminal: true,
        pipe: Some(pipe),
    };
    tokio::spawn(async move {
        while let Some(input) = typed.recv().await {
            keyboard.take(input).await;
        }
    });
    Ok(sender)
}

/// A command under way: its pipes, and its removal.
struct Command {
    container: Arc<Container>,
    exec_id: String,
    dir: PathBuf,
    stdout: pipe::Receiver,
    stderr: Option<pipe::Receiver>,
}

/// Runs a command.
pub(crate) async fn exec(container: &Arc<Container>, request: ExecRequest) -> Done<Exec> {
    let told = |problem: Problem| problem.told(&container.id, "exec");
    if request.command.is_empty() {
        return Err(DriverError::invalid(&container.id, "the command to run is empty"));
    }
    let (command, pipe) = Command::begin(container, &request).await.map_err(told)?;
    let mut keyboard = Keyboard {
        container: container.clone(),
        exec_id: command.exec_id.clone(),
        has_terminal: request.tty.is_some(),
        pipe: Some(pipe),
    };
    let (input, mut typed) = mpsc::channel(QUEUE);
    let (output, printed) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let typing = async {
            while let Some(input) = typed.recv().await {
                keyboard.take(input).await;
            }
            // Nobody types any more, but the command goes on; its input stays open.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = command.run(output) => {}
            () = typing => {}
        }
    });
    let output = stream::unfold(printed, |mut printed| async { Some((printed.recv().await?, printed)) });
    Ok(Exec { output: output.boxed(), input })
}

impl Command {
    async fn begin(container: &Arc<Container>, request: &ExecRequest) -> Outcome<(Self, pipe::Sender)> {
        let exec_id = format!("x{}", Uuid::new_v4().simple());
        let dir = container.dir.file(EXEC).join(&exec_id);
        std::fs::create_dir_all(&dir).map_err(Problem::file("make", &dir))?;
        let outcome = Self::begin_in(container, request, &exec_id, &dir).await;
        if outcome.is_err() {
            let _ = container.shared.client.delete_process(container.id.as_str(), &exec_id).await;
            let _ = std::fs::remove_dir_all(&dir);
        }
        outcome
    }

    async fn begin_in(
        container: &Arc<Container>,
        request: &ExecRequest,
        exec_id: &str,
        dir: &std::path::Path,
    ) -> Outcome<(Self, pipe::Sender)> {
        let terminal = request.tty.is_some();
        let path = |name: &str| dir.join(name);
        // Both ends are held from the beginning: nobody waits for the other, and nothing ends early.
        let receiver = |name: &str| {
            make_pipe(&path(name))?;
            let opened = pipe::OpenOptions::new().read_write(true).open_receiver(path(name));
            opened.map_err(Problem::file("open", &path(name)))
        };
        make_pipe(&path("stdin"))?;
        let stdin = pipe::OpenOptions::new().read_write(true).open_sender(path("stdin"));
        let stdin = stdin.map_err(Problem::file("open", &path("stdin")))?;
        let stdout = receiver("stdout")?;
        let stderr = if terminal { None } else { Some(receiver("stderr")?) };
        let root = container.root().await?;
        let stored = container.stored();
        let process = spec::further_process(&stored, &root, request)?;
        let client = &container.shared.client;
        let text = |name: &str| path(name).display().to_string();
        let wanted = ExecProcessRequest {
            container_id: container.id.to_string(),
            stdin: text("stdin"),
            stdout: text("stdout"),
            stderr: if terminal { String::new() } else { text("stderr") },
            terminal,
            spec: Some(process),
            exec_id: exec_id.to_owned(),
        };
        crate::client::call("exec", client.tasks().exec(client.request(wanted))).await?;
        client.start_process(container.id.as_str(), exec_id).await?;
        let (container, exec_id, dir) = (container.clone(), exec_id.to_owned(), dir.to_owned());
        Ok((Self { container, exec_id, dir, stdout, stderr }, stdin))
    }

    /// Hands on what it prints until it ends; ends it if nobody listens.
    async fn run(mut self, output: Output) {
        let (id, exec_id) = (self.container.id.to_string(), self.exec_id.clone());
        let client = self.container.shared.client.clone();
        let end = {
            let (client, id, exec_id) = (client.clone(), id.clone(), exec_id.clone());
            async move {
                let status = client.wait(&id, &exec_id).await;
                // Returns when all that was printed has gone into the pipes.
                let _ = client.delete_process(&id, &exec_id).await;
                status
            }
        };
        tokio::pin!(end);
        let cancelled = self.container.shared.cancelled.clone();
        let (mut one, mut other) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
        let status = loop {
            tokio::select! {
                biased;
                () = output.closed() => {
                    self.abandon().await;
                    break None;
                }
                () = cancelled.cancelled() => return,
                length = read(Some(&self.stdout), &mut one) => {
                    let _ = output.send(Ok(ExecOutput::Stdout(Bytes::copy_from_slice(&one[..length])))).await;
                }
                length = read(self.stderr.as_ref(), &mut other) => {
                    let _ = output.send(Ok(ExecOutput::Stderr(Bytes::copy_from_slice(&other[..length])))).await;
                }
                status = &mut end => break Some(status),
            }
        };
        if let Some(status) = status {
            self.drain(&output).await;
            let last = match status {
                Ok(code) => Ok(ExecOutput::Exited { code: i32::try_from(code).unwrap_or(i32::MAX) }),
                Err(problem) => Err(problem.told(&self.container.id, "exec")),
            };
            let _ = output.send(last).await;
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }

    async fn drain(&mut self, output: &Output) {
        let mut piece = vec![0; PIECE_BYTES];
        while let Ok(length @ 1..) = self.stdout.try_read(&mut piece) {
            let _ = output.send(Ok(ExecOutput::Stdout(Bytes::copy_from_slice(&piece[..length])))).await;
        }
        while let Some(Ok(length @ 1..)) = self.stderr.as_ref().map(|stderr| stderr.try_read(&mut piece)) {
            let _ = output.send(Ok(ExecOutput::Stderr(Bytes::copy_from_slice(&piece[..length])))).await;
        }
    }

    async fn abandon(&self) {
        let (id, client) = (self.container.id.as_str(), &self.container.shared.client);
        let kill = u32::try_from(Signal::KILL.as_raw()).unwrap_or(9);
        if client.kill(id, &self.exec_id, kill).await.is_ok() {
            let _ = tokio::time::timeout(INPUT_TIMEOUT, client.wait(id, &self.exec_id)).await;
        }
        let _ = client.delete_process(id, &self.exec_id).await;
    }
}

/// Reads what is there; never returns if there is no such stream.
async fn read(from: Option<&pipe::Receiver>, into: &mut [u8]) -> usize {
    let Some(from) = from else { return std::future::pending().await };
    loop {
        if from.readable().await.is_err() {
            return std::future::pending().await;
        }
        if let Ok(length @ 1..) = from.try_read(into) {
            return length;
        }
    }
}
