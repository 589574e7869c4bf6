//! Consoles, commands and logs: both directions between a caller's stream and a driver's.

use std::time::Duration;

use futures::StreamExt as _;
use hv_driver::{ExecOutput, ExecRequest, Input, LogRequest, TerminalSize};
use hv_proto::v1;
use hv_proto::v1::agent_console_input::Input as ConsoleIn;
use hv_proto::v1::exec_input::Input as ExecIn;
use hv_proto::v1::exec_output::Output as ExecOut;
use hv_types::ServiceError;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

use super::deadline::{ask, budget};
use super::{Answer, Outgoing, Service, driver_error, id_from, refuse};

/// The metadata key that names the instance of a console for callers that send no `attach`.
const INSTANCE_ID_KEY: &str = "instance-id";

fn invalid(text: impl Into<String>) -> Status {
    refuse(&ServiceError::invalid(text))
}

/// A terminal's size; 0 by 0 is not said.
fn size(width: i32, height: i32) -> Result<Option<TerminalSize>, Status> {
    if (width, height) == (0, 0) {
        return Ok(None);
    }
    match (u16::try_from(width), u16::try_from(height)) {
        (Ok(width), Ok(height)) if width > 0 && height > 0 => Ok(Some(TerminalSize { width, height })),
        _ => Err(invalid(format!("width and height must be between 1 and 65535; got \"{width}x{height}\""))),
    }
}

fn console_input(message: v1::AgentConsoleInput) -> Result<Option<Input>, Status> {
    match message.input {
        Some(ConsoleIn::Data(data)) => Ok(Some(Input::Data(data))),
        Some(ConsoleIn::Resize(to)) => Ok(size(to.width, to.height)?.map(Input::Resize)),
        Some(ConsoleIn::Attach(attach)) => {
            let to = attach.size.unwrap_or_default();
            Ok(size(to.width, to.height)?.map(Input::Resize))
        }
        None => Ok(None),
    }
}

fn exec_input(message: v1::ExecInput) -> Result<Option<Input>, Status> {
    match message.input {
        Some(ExecIn::Stdin(data)) => Ok(Some(Input::Data(data))),
        Some(ExecIn::Eof(true)) => Ok(Some(Input::Eof)),
        Some(ExecIn::Resize(to)) => Ok(size(to.width, to.height)?.map(Input::Resize)),
        Some(ExecIn::Start(_)) => Err(invalid("start must be the first message, and only that")),
        Some(ExecIn::Eof(false)) | None => Ok(None),
    }
}

/// Hands on what the caller sends until either side ends.
async fn forward<T>(
    mut incoming: Streaming<T>,
    to: mpsc::Sender<Input>,
    translate: impl Fn(T) -> Result<Option<Input>, Status>,
    ends_with_eof: bool,
) {
    loop {
        let message = tokio::select! {
            () = to.closed() => return,
            message = incoming.message() => message,
        };
        let input = match message.and_then(|message| message.map(&translate).transpose()) {
            Ok(Some(Some(input))) => input,
            Ok(Some(None)) => continue,
            Ok(None) if ends_with_eof => Input::Eof,
            Ok(None) => return,
            Err(status) => {
                tracing::debug!(error = status.message(), "the caller's input ended");
                return;
            }
        };
        let is_last = input == Input::Eof;
        if to.send(input).await.is_err() || is_last {
            return;
        }
    }
}

impl Service {
    fn outgoing<T: Send + 'static>(
        &self,
        stream: impl futures::Stream<Item = Result<T, Status>> + Send + 'static,
    ) -> Response<Outgoing<T>> {
        let stopping = self.instances.shutdown().triggered();
        Response::new(Box::pin(stream.take_until(stopping)))
    }

    pub(super) async fn console(
        &self,
        request: Request<Streaming<v1::AgentConsoleInput>>,
    ) -> Answer<Outgoing<v1::AgentConsoleOutput>> {
        let named =
            request.metadata().get(INSTANCE_ID_KEY).and_then(|id| id.to_str().ok()).map(str::to_owned);
        let patience = self.patience(&request);
        let mut incoming = request.into_inner();
        let (id, first) = match named {
            Some(id) => (id, None),
            None => match incoming.message().await?.and_then(|message| message.input) {
                Some(ConsoleIn::Attach(attach)) => {
                    let id = attach.instance_id.clone();
                    (id, Some(v1::AgentConsoleInput { input: Some(ConsoleIn::Attach(attach)) }))
                }
                _ => {
                    let text = format!(
                        "the first message must be `attach`, or the metadata `{INSTANCE_ID_KEY}` be set"
                    );
                    return Err(invalid(text));
                }
            },
        };
        let id = id_from(&id)?;
        let console = ask(patience, self.driver_of(&id)?.console(&id)).await?;
        if let Some(input) = first.map(console_input).transpose()?.flatten() {
            // A console that ended already shows that in its output.
            let _ = console.input.try_send(input);
        }
        tokio::spawn(forward(incoming, console.input, console_input, false));
        let output = console.output.map(|data| match data {
            Ok(data) => Ok(v1::AgentConsoleOutput { data }),
            Err(error) => Err(driver_error(&error)),
        });
        Ok(self.outgoing(output))
    }

    pub(super) async fn run_command(
        &self,
        request: Request<Streaming<v1::ExecInput>>,
    ) -> Answer<Outgoing<v1::ExecOutput>> {
        // A guest's agent may be slow to wake.
        let patience = budget(&request, self.instances.context().tuning.step_deadline);
        let mut incoming = request.into_inner();
        let Some(ExecIn::Start(start)) = incoming.message().await?.and_then(|message| message.input) else {
            return Err(invalid("the first message must be `start`"));
        };
        if start.command.is_empty() {
            return Err(invalid("start.command must name a program; got \"\""));
        }
        let id = id_from(&start.instance_id)?;
        let tty = start.tty.map_or(Ok(None), |tty| size(tty.width, tty.height))?;
        let request = ExecRequest { command: start.command, env: start.env.into_iter().collect(), tty };
        let exec = ask(patience, self.driver_of(&id)?.exec(&id, request)).await?;
        tokio::spawn(forward(incoming, exec.input, exec_input, true));
        let output = exec.output.map(|item| {
            let output = match item.map_err(|e| driver_error(&e))? {
                ExecOutput::Stdout(data) => ExecOut::Stdout(data),
                ExecOutput::Stderr(data) => ExecOut::Stderr(data),
                ExecOutput::Exited { code } => ExecOut::ExitCode(code),
            };
            Ok(v1::ExecOutput { output: Some(output) })
        });
        Ok(self.outgoing(output))
    }

    pub(super) async fn logs(
        &self,
        request: v1::GetInstanceLogsRequest,
        patience: Duration,
    ) -> Answer<Outgoing<v1::LogChunk>> {
        let id = id_from(&request.instance_id)?;
        let tail_lines = match u64::try_from(request.tail_lines) {
            Ok(0) => None,
            Ok(lines) => Some(lines),
            Err(_) => {
                return Err(invalid(format!(
                    "tail_lines must not be negative; got \"{}\"",
                    request.tail_lines
                )));
            }
        };
        let wanted = LogRequest {
            tail_lines,
            follow: request.follow,
            since: request.since.as_ref().map(hv_proto::convert::from_timestamp),
        };
        let log = ask(patience, self.driver_of(&id)?.logs(&id, wanted)).await?;
        let chunks = log.map(|data| match data {
            Ok(data) => Ok(v1::LogChunk { data }),
            Err(error) => Err(driver_error(&error)),
        });
        Ok(self.outgoing(chunks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_without_a_size_keeps_its_own() {
        assert_eq!(size(0, 0).unwrap(), None);
        assert_eq!(size(80, 24).unwrap(), Some(TerminalSize { width: 80, height: 24 }));
        for (width, height) in [(80, 0), (-1, 24), (70_000, 24)] {
            assert!(size(width, height).is_err(), "{width}x{height}");
        }
    }
}
