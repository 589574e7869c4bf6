//! The way to libvirtd, which is found again whenever it is lost.
//!
//! # Theory of operation
//! One task connects, registers for events and hands them on; when the connection ends it says so at once and tries
//! again, ever more slowly up to a bound. Whoever hears [`Notice::Connected`] looks at everything anew, because events
//! may have been missed. Guests do not notice any of this.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::daemon::Daemon;
use crate::problem::{Outcome, Problem};
use crate::rpc::Event;

/// How long to wait before the next try, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How long whoever needs libvirtd waits for a connection that is being made.
const WAIT: Duration = Duration::from_secs(2);
/// How long the first connection may take: a libvirtd that just starts looks at every emulator.
const FIRST_WAIT: Duration = Duration::from_secs(30);
/// How many notices wait.
const NOTICE_QUEUE: usize = 1024;
/// Where libvirtd listens, and its successor for QEMU alone.
const SOCKETS: [&str; 2] = ["/run/libvirt/libvirt-sock", "/run/libvirt/virtqemud-sock"];
/// What libvirtd is asked for.
const URI: &str = "qemu:///system";

/// What happens on the way.
#[derive(Debug)]
pub(crate) enum Notice {
    /// There is a new connection.
    Connected,
    /// libvirtd says something.
    Said(Event),
}

#[derive(Clone)]
enum Status {
    /// No try is over yet.
    Trying,
    Up(Arc<Daemon>),
    Down(String),
}

impl Status {
    fn is_up(&self) -> bool {
        matches!(self, Self::Up(daemon) if !daemon.connection.is_closed())
    }
}

/// The way to libvirtd.
pub(crate) struct Link {
    sockets: Result<Vec<PathBuf>, String>,
    status: watch::Sender<Status>,
    notices: mpsc::Sender<Notice>,
    heard: Mutex<Option<mpsc::Receiver<Notice>>>,
    pub(crate) cancelled: CancellationToken,
}

impl Link {
    pub(crate) fn new(uri: &str) -> Arc<Self> {
        let (notices, heard) = mpsc::channel(NOTICE_QUEUE);
        Arc::new(Self {
            sockets: sockets(uri),
            status: watch::channel(Status::Trying).0,
            notices,
            heard: Mutex::new(Some(heard)),
            cancelled: CancellationToken::new(),
        })
    }

    /// Begins to connect; `None` if it was begun before.
    pub(crate) fn begin(self: &Arc<Self>) -> Option<mpsc::Receiver<Notice>> {
        let heard = self.heard.lock().take()?;
        let (link, cancelled) = (self.clone(), self.cancelled.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = cancelled.cancelled() => {}
                () = link.keep() => {}
            }
            link.status.send_replace(Status::Down("the driver ended".to_owned()));
        });
        Some(heard)
    }

    async fn keep(&self) {
        let mut pause = RETRY.0;
        loop {
            match self.connect().await {
                Ok((daemon, mut events)) => {
                    pause = RETRY.0;
                    let daemon = Arc::new(daemon);
                    self.status.send_replace(Status::Up(daemon.clone()));
                    let _ = self.notices.send(Notice::Connected).await;
                    loop {
                        tokio::select! {
                            Some(event) = events.recv() => {
                                let _ = self.notices.send(Notice::Said(event)).await;
                            }
                            () = daemon.connection.closed() => break,
                        }
                    }
                    tracing::warn!("libvirtd is gone; guests go on, it is tried again");
                    self.status.send_replace(Status::Down("libvirtd has just ended".to_owned()));
                }
                Err(reason) => {
                    self.status.send_replace(Status::Down(reason));
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY.1);
        }
    }

    async fn connect(&self) -> Result<(Daemon, mpsc::Receiver<Event>), String> {
        let sockets = self.sockets.as_ref().map_err(Clone::clone)?;
        let mut reasons = Vec::new();
        for socket in sockets {
            match Daemon::open(socket, URI).await {
                Ok(opened) => return Ok(opened),
                Err(problem) => reasons.push(problem.to_string()),
            }
        }
        Err(reasons.join("; "))
    }

    /// A connection of its own for a long piece of work.
    pub(crate) async fn another(&self) -> Outcome<Daemon> {
        // Waits for libvirtd where that is just coming up.
        self.daemon().await?;
        let (daemon, mut events) = self.connect().await.map_err(Problem::Unreachable)?;
        tokio::spawn(async move { while events.recv().await.is_some() {} });
        Ok(daemon)
    }

    /// One item whenever libvirtd goes or comes back.
    pub(crate) fn turns(&self) -> BoxStream<'static, ()> {
        let mut status = self.status.subscribe();
        let known = status.borrow_and_update().is_up();
        stream::unfold((status, known), |(mut status, known)| async move {
            let turned = status.wait_for(|status| status.is_up() != known).await.ok()?.is_up();
            Some(((), (status, turned)))
        })
        .boxed()
    }

    /// Why there is no libvirtd at this moment; `None` where there is one, or none was looked for yet.
    pub(crate) fn trouble(&self) -> Option<Problem> {
        match &*self.status.borrow() {
            Status::Down(reason) => Some(Problem::Unreachable(reason.clone())),
            Status::Trying | Status::Up(_) => None,
        }
    }

    /// libvirtd, as soon as it is connected.
    pub(crate) async fn daemon(&self) -> Outcome<Arc<Daemon>> {
        let mut status = self.status.subscribe();
        if let Status::Up(daemon) = &*status.borrow()
            && !daemon.connection.is_closed()
        {
            return Ok(daemon.clone());
        }
        let wait = if matches!(*status.borrow(), Status::Trying) { FIRST_WAIT } else { WAIT };
        if let Ok(Ok(status)) = tokio::time::timeout(wait, status.wait_for(Status::is_up)).await
            && let Status::Up(daemon) = &*status
        {
            return Ok(daemon.clone());
        }
        let reason = match &*self.status.borrow() {
            Status::Down(reason) => reason.clone(),
            Status::Trying | Status::Up(_) => "it does not answer".to_owned(),
        };
        Err(Problem::Unreachable(reason))
    }
}

/// The sockets that an address means.
fn sockets(uri: &str) -> Result<Vec<PathBuf>, String> {
    if uri == URI {
        return Ok(SOCKETS.iter().map(PathBuf::from).collect());
    }
    match uri.strip_prefix("qemu+unix:///system?socket=") {
        Some(path) if path.starts_with('/') => Ok(vec![PathBuf::from(path)]),
        _ => Err(format!(
            "drivers.libvirt.uri must be {URI} or qemu+unix:///system?socket=/path; got {}",
            hv_types::validate::excerpt(uri)
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_sockets_of_this_node() {
        assert_eq!(sockets("qemu:///system").unwrap().len(), 2);
        assert_eq!(sockets("qemu+unix:///system?socket=/x/y").unwrap(), [PathBuf::from("/x/y")]);
        for wrong in ["qemu:///session", "qemu+ssh://host/system", "", "qemu+unix:///system?socket=y"] {
            assert!(sockets(wrong).is_err(), "{wrong}");
        }
    }
}
