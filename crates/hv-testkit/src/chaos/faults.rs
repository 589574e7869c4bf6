//! What can go wrong, done and undone.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result};

use super::dice::Dice;
use super::world::World;
use crate::netns::Cut;

/// How long a process stays dead or frozen, and a link cut: from hardly noticed to longer than every timeout.
const SHORT: Duration = Duration::from_millis(200);
const LONG: Duration = Duration::from_secs(7);
/// How far a wall clock is set.
const CLOCK_STEP_SECONDS: i64 = 3600;

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9` of a server, which is started again.
    KillServer(usize),
    /// A server stands still.
    FreezeServer(usize),
    /// `kill -9` of an agent, which is started again.
    KillAgent(usize),
    /// An agent stands still.
    FreezeAgent(usize),
    /// `kill -9` of an agent's fencer.
    KillFencer(usize),
    /// `kill -9` of a member of etcd, which is started again.
    KillMember(usize),
    /// A member of etcd stands still.
    FreezeMember(usize),
    /// A member of etcd answers in bursts, as with a disk that is much too slow.
    SlowMember(usize),
    /// A server's link is cut.
    CutServer(usize, Cut),
    /// An agent's link is cut.
    CutAgent(usize, Cut),
    /// The link of a member of etcd is cut.
    CutMember(usize, Cut),
    /// A server's wall clock jumps, forward if true.
    StepClock(usize, bool),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The faults that a world can have, drawn from a seed: first the kind, so that each is as frequent, then whom it meets.
#[derive(Debug)]
pub struct Weather {
    kinds: Vec<Vec<Fault>>,
    dice: Dice,
}

impl Weather {
    /// Everything that this world can have.
    #[must_use]
    pub fn of(world: &World, dice: Dice) -> Self {
        let options = &world.options;
        let (servers, agents, members) = (0..options.servers, 0..options.agents, 0..options.members);
        let mut kinds: Vec<Vec<Fault>> = vec![
            servers.clone().map(Fault::KillServer).collect(),
            servers.clone().map(Fault::FreezeServer).collect(),
            agents.clone().map(Fault::KillAgent).collect(),
            agents.clone().map(Fault::FreezeAgent).collect(),
            agents.clone().map(Fault::KillFencer).collect(),
            members.clone().map(Fault::KillMember).collect(),
            members.clone().map(Fault::FreezeMember).collect(),
            members.clone().map(Fault::SlowMember).collect(),
        ];
        if options.network {
            let cuts = [Cut::In, Cut::Out, Cut::Both];
            kinds.push(servers.flat_map(|server| cuts.map(|cut| Fault::CutServer(server, cut))).collect());
            kinds.push(agents.flat_map(|agent| cuts.map(|cut| Fault::CutAgent(agent, cut))).collect());
            kinds.push(members.flat_map(|member| cuts.map(|cut| Fault::CutMember(member, cut))).collect());
        }
        let clocks = 0..world.shims.len();
        kinds.push(
            clocks.flat_map(|server| [true, false].map(|ahead| Fault::StepClock(server, ahead))).collect(),
        );
        kinds.retain(|kind| !kind.is_empty());
        Self { kinds, dice }
    }

    /// The next one, and how long it lasts.
    pub fn draw(&mut self) -> (Fault, Duration) {
        let kind = self.dice.pick(&self.kinds).clone();
        (*self.dice.pick(&kind), self.dice.between(SHORT, LONG))
    }
}

impl World {
    /// Does a fault, waits, and undoes it.
    ///
    /// # Errors
    /// It cannot be done, or a process does not come up again.
    pub async fn suffer(&mut self, fault: Fault, lasts: Duration) -> Result<()> {
        self.begin(fault)?;
        match fault {
            Fault::SlowMember(member) => self.stutter(member, lasts).await?,
            _ => tokio::time::sleep(lasts).await,
        }
        self.end(fault).await.with_context(|| format!("{fault} cannot be undone"))
    }

    fn begin(&mut self, fault: Fault) -> Result<()> {
        const GONE: &str = "the process is gone";
        const NO_HOST: &str = "there is no network";
        match fault {
            Fault::KillServer(server) => self.cluster.server_at(server).context(GONE)?.kill(),
            Fault::FreezeServer(server) => self.cluster.server_at(server).context(GONE)?.freeze(),
            Fault::KillAgent(agent) => self.cluster.agent(agent).context(GONE)?.kill(),
            Fault::FreezeAgent(agent) => self.cluster.agent(agent).context(GONE)?.freeze(),
            Fault::KillFencer(agent) => {
                for pid in fencers(&self.cluster.agent_dir(agent))? {
                    // It may have ended in this moment.
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
                Ok(())
            }
            Fault::KillMember(member) => self.etcd.kill_member(member),
            Fault::FreezeMember(member) => self.etcd.member(member).context(GONE)?.freeze(),
            Fault::SlowMember(_) => Ok(()),
            Fault::CutServer(server, cut) => self.cluster.server_host(server).context(NO_HOST)?.cut(cut),
            Fault::CutAgent(agent, cut) => self.cluster.agent_host(agent).context(NO_HOST)?.cut(cut),
            Fault::CutMember(member, cut) => self.etcd.member_host(member).context(NO_HOST)?.cut(cut),
            Fault::StepClock(server, forward) => {
                let seconds = if forward { CLOCK_STEP_SECONDS } else { -CLOCK_STEP_SECONDS };
                self.shims[server].set_clock(seconds)
            }
        }
    }

    async fn end(&mut self, fault: Fault) -> Result<()> {
        const GONE: &str = "the process is gone";
        match fault {
            Fault::KillServer(server) => self.start_server(server).await,
            Fault::FreezeServer(server) => self.cluster.server_at(server).context(GONE)?.thaw(),
            Fault::KillAgent(agent) => self.cluster.start_agent(agent, &[]).await,
            Fault::FreezeAgent(agent) => self.after_freeze(agent).await,
            Fault::KillFencer(_) | Fault::SlowMember(_) => Ok(()),
            Fault::KillMember(member) => self.etcd.start_member(member),
            Fault::FreezeMember(member) => self.etcd.member(member).context(GONE)?.thaw(),
            Fault::CutServer(server, _) => self.cluster.server_host(server).context("no host")?.heal(),
            Fault::CutAgent(agent, _) => self.cluster.agent_host(agent).context("no host")?.heal(),
            Fault::CutMember(member, _) => self.etcd.member_host(member).context("no host")?.heal(),
            Fault::StepClock(server, _) => self.shims[server].set_clock(0),
        }
    }

    /// An agent that stood still goes on. Its fencer may have ended it meanwhile, to be sure; then it is started again, as
    /// the system's service manager would.
    async fn after_freeze(&mut self, agent: usize) -> Result<()> {
        let process = self.cluster.agent(agent).context("the process is gone")?;
        if process.ended()?.is_none() {
            process.thaw()?;
        }
        self.revive().await
    }

    /// Starts agents and servers again that have ended by themselves, as the system's service manager would.
    ///
    /// # Errors
    /// One does not come up.
    pub async fn revive(&mut self) -> Result<()> {
        for server in 0..self.options.servers {
            if self.cluster.server_at(server).map(|process| process.ended()).transpose()?.flatten().is_some()
            {
                self.start_server(server).await?;
            }
        }
        for agent in 0..self.options.agents {
            if self.cluster.agent(agent).map(|process| process.ended()).transpose()?.flatten().is_some() {
                self.cluster.start_agent(agent, &[]).await?;
            }
        }
        Ok(())
    }

    /// A member of etcd that runs for a moment and stands still for a moment, in turns.
    async fn stutter(&self, member: usize, lasts: Duration) -> Result<()> {
        let end = tokio::time::Instant::now() + lasts;
        let process = self.etcd.member(member).context("the process is gone")?;
        while tokio::time::Instant::now() < end {
            process.freeze()?;
            tokio::time::sleep(Duration::from_millis(150)).await;
            process.thaw()?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }
}

/// The fencers of the agent with this state directory.
fn fencers(state_dir: &std::path::Path) -> Result<Vec<rustix::process::Pid>> {
    let dir = state_dir.display().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) =
            entry.file_name().to_string_lossy().parse().ok().and_then(rustix::process::Pid::from_raw)
        else {
            continue;
        };
        // A process may end between the two looks.
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command);
        let words: Vec<_> = command.split('\0').collect();
        if words.first().is_some_and(|program| program.ends_with("hypervisor-agent"))
            && words.contains(&"fencer")
            && words.iter().any(|word| word.contains(&dir))
        {
            found.push(pid);
        }
    }
    Ok(found)
}
