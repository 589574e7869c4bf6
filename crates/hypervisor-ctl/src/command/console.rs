//! `instance console`.

use std::io::IsTerminal;

use bytes::Bytes;
use hv_proto::v1::{self, console_input};
use hv_types::InstanceType;
use tokio::sync::mpsc;
use tokio::time::{Duration, Instant};
use tokio_stream::wrappers::ReceiverStream;

use super::Context;
use super::stdin::{self, End, QUEUE};
use crate::cli::ConsoleArgs;
use crate::error::{CtlError, exit_code};
use crate::output::text::escape;
use crate::output::write_stdout;
use crate::reference;
use crate::terminal::{self, RawMode};
use crate::wait::deadline;

pub(super) async fn run(
    context: &Context,
    only: Option<InstanceType>,
    args: &ConsoleArgs,
) -> Result<u8, CtlError> {
    let server = &context.server;
    let target = reference::instance(server, only, &args.name).await?;
    let name = escape(&target.name);
    let on_terminal = std::io::stdin().is_terminal();
    let interactive = on_terminal && args.until.is_none() && !args.no_raw;
    let sends = args.until.is_none() || args.no_raw;

    let (sender, receiver) = mpsc::channel(QUEUE);
    let size = if interactive { stdin::size() } else { None };
    let attach = v1::ConsoleAttach { instance_id: target.id, size };
    // The queue is empty: there is room.
    let _ = sender.try_send(message(console_input::Input::Attach(attach)));
    let opened = server.compute().console(ReceiverStream::new(receiver)).await;
    let mut output = opened.map_err(|status| server.error(&status))?.into_inner();

    let raw = if interactive {
        let how = match args.detach_key.0 {
            Some(_) => format!("; {} detaches", args.detach_key),
            None => String::new(),
        };
        context.note(&format!("attached to the console of {name}{how}"));
        Some(RawMode::enter()?)
    } else {
        None
    };
    let detach = args.detach_key.0.filter(|_| interactive);
    let mut input = sends.then(|| tokio::spawn(stdin::forward(sender.clone(), typed, detach)));
    let sizes = interactive.then(|| tokio::spawn(stdin::forward_sizes(sender.clone(), resized)));

    let session = Session {
        until: args.until.as_ref().map(|text| Needle::new(text.as_bytes())),
        end: args.until.as_ref().map(|_| deadline(server.timeout)),
        linger: args.linger.get(),
        quiet_until: None,
        line_until: None,
    };
    let ended = session.run(&mut output, &mut input).await;
    drop(raw);
    if let Some(sizes) = sizes {
        sizes.abort();
    }
    if let Some(input) = input {
        input.abort();
    }
    conclude(context, args, &name, ended)
}

/// Says how it ended.
fn conclude(context: &Context, args: &ConsoleArgs, name: &str, ended: Ended) -> Result<u8, CtlError> {
    let server = &context.server;
    match (ended, &args.until) {
        (Ended::Seen | Ended::Quiet, _) => Ok(exit_code::OK),
        (Ended::Detached, _) => {
            context.note("\ndetached".trim_start());
            Ok(exit_code::OK)
        }
        (Ended::TimedOut, Some(until)) => Err(CtlError::TimedOut {
            what: format!("the console of {name} has not printed {until:?}"),
            after: server.timeout,
            hint: "; wait longer with --timeout".to_owned(),
        }),
        (Ended::Closed, Some(until)) => {
            Err(CtlError::Ended(format!("the console of {name} was closed before it printed {until:?}")))
        }
        (Ended::Closed | Ended::TimedOut, None) => {
            context.note(&format!("the console of {name} was closed"));
            Ok(exit_code::OK)
        }
        (Ended::Broken(status), _) => Err(server.error(&status)),
        (Ended::Stdin(source), _) => Err(CtlError::Stream { action: "read standard input", source }),
        (Ended::Stdout(error), _) => Err(error),
        (Ended::Signal(signal), _) => Err(CtlError::Signal(signal)),
    }
}

fn message(input: console_input::Input) -> v1::ConsoleInput {
    v1::ConsoleInput { input: Some(input) }
}

fn typed(data: Bytes) -> v1::ConsoleInput {
    message(console_input::Input::Data(data))
}

fn resized(size: v1::TerminalSize) -> v1::ConsoleInput {
    message(console_input::Input::Resize(size))
}

/// Why a session is over.
enum Ended {
    Seen,
    Quiet,
    Detached,
    Closed,
    TimedOut,
    Broken(tonic::Status),
    Stdin(std::io::Error),
    Stdout(CtlError),
    Signal(u8),
}

struct Session {
    until: Option<Needle>,
    end: Option<Instant>,
    linger: Duration,
    /// Set once standard input has ended: when to stop if nothing is printed.
    quiet_until: Option<Instant>,
    /// Set once the text was seen: when to stop if its line does not end.
    line_until: Option<Instant>,
}

/// How long the rest of the line may take in which the text was seen.
const LINE_GRACE: Duration = Duration::from_millis(300);

impl Session {
    async fn run(
        mut self,
        output: &mut tonic::Streaming<v1::ConsoleData>,
        input: &mut Option<tokio::task::JoinHandle<End>>,
    ) -> Ended {
        let signal = terminal::ended_by_signal();
        tokio::pin!(signal);
        loop {
            tokio::select! {
                printed = output.message() => match printed {
                    Ok(Some(printed)) => if let Some(ended) = self.print(&printed.data) { return ended },
                    Ok(None) => return Ended::Closed,
                    Err(status) => return Ended::Broken(status),
                },
                end = finished(input) => match end {
                    End::Eof if self.until.is_none() => self.quiet_until = Some(Instant::now() + self.linger),
                    End::Eof => {}
                    End::Detached => return Ended::Detached,
                    End::Failed(error) => return Ended::Stdin(error),
                },
                () = at(self.quiet_until) => return Ended::Quiet,
                () = at(self.line_until) => return Ended::Seen,
                () = at(self.end) => return Ended::TimedOut,
                number = &mut signal => return Ended::Signal(number),
            }
        }
    }

    fn print(&mut self, bytes: &[u8]) -> Option<Ended> {
        if let Err(error) = write_stdout(bytes) {
            return Some(Ended::Stdout(error));
        }
        if self.quiet_until.is_some() {
            self.quiet_until = Some(Instant::now() + self.linger);
        }
        let rest = match self.line_until {
            Some(_) => bytes,
            None => &bytes[self.until.as_mut().and_then(|needle| needle.seen(bytes))?..],
        };
        if rest.contains(&b'\n') {
            return Some(Ended::Seen);
        }
        self.line_until.get_or_insert(Instant::now() + LINE_GRACE);
        None
    }
}

/// Never, without a moment.
pub(super) async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Why the input task is over; never again after it was told once.
pub(super) async fn finished(input: &mut Option<tokio::task::JoinHandle<End>>) -> End {
    let Some(task) = input else { return std::future::pending().await };
    let end = match task.await {
        Ok(end) => end,
        Err(error) => End::Failed(std::io::Error::other(error)),
    };
    *input = None;
    end
}

/// Finds a text in a stream, also where it is cut into parts.
struct Needle {
    text: Vec<u8>,
    /// The end of what was seen, one byte shorter than the text.
    tail: Vec<u8>,
}

impl Needle {
    fn new(text: &[u8]) -> Self {
        Self { text: text.to_vec(), tail: Vec::new() }
    }

    /// Where in `bytes` the text ends, if it does in these.
    fn seen(&mut self, bytes: &[u8]) -> Option<usize> {
        let before = self.tail.len();
        self.tail.extend_from_slice(bytes);
        let start = match self.text.len() {
            0 => Some(before),
            length => self.tail.windows(length).position(|window| window == self.text),
        };
        let end = start.map(|start| start + self.text.len() - before);
        let keep = self.text.len().saturating_sub(1).min(self.tail.len());
        self.tail.drain(..self.tail.len() - keep);
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_found_across_parts_and_only_whole() {
        let mut needle = Needle::new(b"login:");
        assert_eq!((needle.seen(b"log"), needle.seen(b"i")), (None, None));
        assert_eq!(needle.seen(b"n: "), Some(2));
        assert_eq!(needle.seen(b"gin:"), None);
        assert_eq!(needle.seen(b"xlogin:"), Some(7));
        assert!(needle.tail.len() < 6);
    }
}
