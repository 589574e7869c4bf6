//! What a machine is doing: asked of libvirtd, completed from the directory, and from the lock where libvirtd is away.

use std::sync::atomic::Ordering;
use std::time::Duration;

use hv_driver::{DriverEvent, Exit, Observed, Running, fence};

use crate::files::{EXIT, PERMIT, RUN, StoredExit, StoredMigration, StoredPhase, StoredRun};
use crate::machine::{Done, LOCK_INTERVAL, Machine, Seen, fence_target};
use crate::problem::{Outcome, Problem};
use crate::protocol::state;

/// How long libvirtd may take to notice that a machine ended.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(2);
/// The address that user-mode networking gives the guest.
const USER_ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(10, 0, 2, 15);

impl Machine {
    /// What it is doing.
    pub(crate) async fn look(&self) -> Outcome<Seen> {
        let begun = tokio::time::Instant::now();
        loop {
            let answer = match self.daemon().await {
                Ok(daemon) => daemon.state(&self.stored().domain()).await,
                Err(problem) => Err(problem),
            };
            let state = match answer {
                Ok(state) => state,
                Err(problem) if problem.is_away() => return self.seen_without_daemon(problem),
                Err(other) => return Err(other),
            };
            if !self.is_behind(state) {
                return self.seen(state);
            }
            if begun.elapsed() > NOTICE_TIMEOUT {
                return self.seen(Some((state::SHUTOFF, state::SHUTOFF_CRASHED)));
            }
            tokio::time::sleep(LOCK_INTERVAL).await;
        }
    }

    /// Whether libvirtd has not noticed yet that it ended: it runs for libvirtd, and nobody holds its lock.
    fn is_behind(&self, state: Option<(i32, i32)>) -> bool {
        !matches!(state, None | Some((state::SHUTOFF | state::CRASHED, _)))
            && !self.starting.load(Ordering::Acquire)
            && !self.is_awaited()
            && fence::may_run(&fence_target(&self.dir.path)) == Some(false)
    }

    fn seen(&self, state: Option<(i32, i32)>) -> Outcome<Seen> {
        let note = self.note()?;
        let phase = note.map(|note| note.phase);
        match state {
            None | Some((state::SHUTOFF | state::CRASHED, _)) => match phase {
                Some(StoredPhase::Awaited) => Ok(Seen::Paused),
                Some(StoredPhase::HandedOver) => {
                    self.ended();
                    Ok(Seen::HandedOver)
                }
                _ if self.starting.load(Ordering::Acquire) => Ok(Seen::Down(self.last_exit.lock().clone())),
                _ => {
                    let exit = self.exit(state)?;
                    self.ended();
                    Ok(Seen::Down(exit))
                }
            },
            Some((state::PAUSED, reason)) => {
                self.live();
                let is_sent = reason == state::PAUSED_MIGRATION;
                match phase {
                    // The last of its memory is on the way; who sends it knows how that ends.
                    Some(StoredPhase::Sending) if is_sent && self.is_sending() => Ok(Seen::Running),
                    Some(StoredPhase::Sending | StoredPhase::HandedOver) if is_sent => Ok(Seen::HandedOver),
                    Some(StoredPhase::HandedOver) => Ok(Seen::HandedOver),
                    Some(StoredPhase::Awaited | StoredPhase::Arrived) => Ok(Seen::Paused),
                    _ if reason == state::PAUSED_STARTING_UP => Ok(Seen::Running),
                    _ => Ok(Seen::Paused),
                }
            }
            Some(_) => {
                self.live();
                Ok(if phase == Some(StoredPhase::Awaited) { Seen::Paused } else { Seen::Running })
            }
        }
    }

    fn is_awaited(&self) -> bool {
        matches!(self.note(), Ok(Some(StoredMigration { phase: StoredPhase::Awaited, .. })))
    }

    pub(crate) fn is_sending(&self) -> bool {
        self.sending.lock().as_ref().is_some_and(|sending| !sending.is_over())
    }

    /// libvirtd is away. Guests go on without it, and the lock says so.
    fn seen_without_daemon(&self, problem: Problem) -> Outcome<Seen> {
        if let Some(note) = self.note()? {
            match note.phase {
                StoredPhase::HandedOver => return Ok(Seen::HandedOver),
                StoredPhase::Awaited => return Ok(Seen::Paused),
                StoredPhase::Arrived
                | StoredPhase::GivenUp
                | StoredPhase::Sending
                | StoredPhase::Failed(_) => {}
            }
        }
        if fence::may_run(&fence_target(&self.dir.path)) == Some(true) {
            self.live();
            return Ok(Seen::Running);
        }
        // How it ended only libvirtd may know; but what never started has not ended.
        let run: Option<StoredRun> = self.dir.read(RUN)?;
        let known: Option<StoredExit> = self.dir.read(EXIT)?;
        match (run, known) {
            (None, _) => Ok(Seen::Down(Exit::NeverStarted)),
            (Some(run), Some(known)) if known.run == run.number => Ok(Seen::Down(known.exit)),
            _ => Err(problem),
        }
    }

    /// How the last run ended; written down, because libvirtd forgets it when it ends itself.
    fn exit(&self, state: Option<(i32, i32)>) -> Outcome<Exit> {
        // Several may look at once, and one of them writes.
        let _noting = self.noting.lock();
        let Some(run) = self.dir.read::<StoredRun>(RUN)? else { return Ok(Exit::NeverStarted) };
        if let Some(known) = self.dir.read::<StoredExit>(EXIT)?
            && known.run == run.number
        {
            return Ok(known.exit);
        }
        let exit = match state {
            Some((state::CRASHED, _)) => Exit::Failed("the guest panicked".to_owned()),
            Some((_, state::SHUTOFF_SHUTDOWN)) => Exit::Finished,
            Some((_, state::SHUTOFF_DESTROYED)) => Exit::Failed("somebody else destroyed the domain".to_owned()),
            Some((_, state::SHUTOFF_CRASHED)) => Exit::Failed("qemu ended unexpectedly".to_owned()),
            Some((_, state::SHUTOFF_FAILED)) => Exit::Failed("qemu could not be started or failed".to_owned()),
            Some((_, state::SHUTOFF_MIGRATED)) => Exit::Failed("somebody else migrated the domain".to_owned()),
            _ => Exit::Lost,
        };
        self.dir.write(EXIT, &StoredExit { run: run.number, exit: exit.clone() })?;
        self.dir.remove(PERMIT)?;
        Ok(exit)
    }

    /// Looks whether it has ended, and says so if nobody asked for it.
    pub(crate) async fn check_ended(&self, what: &str) {
        let was_asked = self.stopping.load(Ordering::Acquire);
        let was_live = self.live.lock().is_some();
        match self.look().await {
            Ok(Seen::Down(exit)) if !was_asked => {
                if was_live || !what.is_empty() {
                    let what = format!("the virtual machine ended: {exit:?}");
                    let _ = self.shared.events.send(DriverEvent { id: self.id.clone(), what });
                }
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(instance = %self.id, %error, "its end cannot be looked at"),
        }
    }

    pub(crate) async fn observe(&self) -> Done<Observed> {
        let seen = self.look().await.map_err(self.failed("observe"))?;
        if let Seen::Down(exit) = seen {
            return Ok(Observed::Stopped(exit));
        }
        if seen == Seen::HandedOver {
            return Ok(Observed::HandedOver);
        }
        let run = self.dir.read::<StoredRun>(RUN).map_err(self.failed("observe"))?;
        let stored = self.stored();
        let ip = match &stored.network {
            None => Some(USER_ADDRESS.into()),
            // An address that is not known yet is no failure.
            Some(_) => match self.daemon().await {
                Ok(daemon) => daemon.leased_address(&stored.domain()).await.ok().flatten(),
                Err(_) => None,
            },
        };
        let running = Running { since: run.map(StoredRun::since), ip };
        Ok(if seen == Seen::Paused { Observed::Paused(running) } else { Observed::Running(running) })
    }
}
