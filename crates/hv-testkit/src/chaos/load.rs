//! The load: clients that live through instances' lives, and write down every answer.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hv_client::Clients;
use hv_proto::v1;
use tokio::task::JoinSet;
use tonic::{Code, Status};

use super::dice::Dice;
use crate::instances::create_request;

/// How long one try of a call may take before it is tried through another server.
const TRY: Duration = Duration::from_secs(5);
/// The pause between two tries.
const PAUSE: Duration = Duration::from_millis(50);
/// How long a call may be without an answer before it counts as wedged; faults last far less.
const WEDGED: Duration = Duration::from_secs(120);

/// How many instances each client leaves alone, so that there is something that may be lost, and yet no node fills up.
const KEPT: usize = 4;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Clients at once, each with one instance at a time.
    pub clients: usize,
    /// How many of a hundred instances are to be restarted elsewhere when their node is lost.
    pub failover_percent: usize,
    /// The longest pause of a client between two calls.
    pub pause: Duration,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { clients: 8, failover_percent: 50, pause: Duration::from_millis(500) }
    }
}

/// What was asked of one instance, and what was acknowledged.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// The key of its create.
    pub create_key: String,
    /// Its id.
    pub id: String,
    /// Whether it is restarted elsewhere when its node is lost.
    pub failover: bool,
    /// What was acknowledged last that it is to be.
    pub wanted: v1::InstanceWanted,
}

/// One answered call.
#[derive(Clone, Copy, Debug)]
pub struct Answered {
    /// When it was first tried, since the load's begin.
    pub at: Duration,
    /// Until its answer, over all tries.
    pub took: Duration,
}

/// Everything that happened, shared by the clients.
#[derive(Debug, Default)]
pub struct Book {
    /// What was acknowledged.
    pub records: Vec<Record>,
    /// Calls that were answered.
    pub answered: Vec<Answered>,
    /// What must not happen, as it was seen.
    pub violations: Vec<String>,
}

/// A load that runs.
pub struct Load {
    stop: Arc<AtomicBool>,
    book: Arc<Mutex<Book>>,
    clients: JoinSet<()>,
}

impl Load {
    /// Begins, over clients of every server.
    #[must_use]
    pub fn start(servers: &[Clients], options: &LoadOptions, dice: &mut Dice) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let book = Arc::new(Mutex::new(Book::default()));
        let mut clients = JoinSet::new();
        let begin = Instant::now();
        for number in 0..options.clients {
            let client = Client {
                number,
                begin,
                servers: servers.to_vec(),
                options: options.clone(),
                dice: dice.fork(),
                book: book.clone(),
                stop: stop.clone(),
                calls: 0,
                kept: VecDeque::new(),
            };
            clients.spawn(client.run());
        }
        Self { stop, book, clients }
    }

    /// How many calls were answered so far.
    #[must_use]
    pub fn answered(&self) -> usize {
        lock(&self.book).answered.len()
    }

    /// Ends it: every client comes to the end of its call.
    pub async fn finish(mut self) -> Book {
        self.stop.store(true, Ordering::Relaxed);
        while self.clients.join_next().await.is_some() {}
        std::mem::take(&mut *lock(&self.book))
    }
}

fn lock(book: &Mutex<Book>) -> std::sync::MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Client {
    number: usize,
    begin: Instant,
    servers: Vec<Clients>,
    options: LoadOptions,
    dice: Dice,
    book: Arc<Mutex<Book>>,
    stop: Arc<AtomicBool>,
    calls: usize,
    kept: VecDeque<Created>,
}

/// An instance that was created.
#[derive(Clone)]
struct Created {
    /// Where it is in the book.
    index: usize,
    name: String,
    id: String,
}

/// A change of an instance that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Stop,
    Start,
    Delete,
}

impl Client {
    async fn run(mut self) {
        let mut life = 0;
        while !self.stopped() {
            life += 1;
            if self.one_life(life).await.is_none() {
                return;
            }
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// One instance, from its create on. `None`: a call is wedged or was refused, which is in the book.
    async fn one_life(&mut self, life: usize) -> Option<()> {
        let name = format!("c{}-{life}-x", self.number);
        let failover = self.dice.chance(self.options.failover_percent);
        let key = self.key();
        let policy = if failover { v1::FailoverPolicy::Restart } else { v1::FailoverPolicy::Never };
        let request = v1::CreateInstanceRequest {
            request_key: key.clone(),
            failover_policy: policy.into(),
            ..create_request(&name)
        };
        let id = self.until_answered(&name, "create", |clients| {
            let (mut client, request) = (clients.compute(), request.clone());
            async move { Ok(client.create_instance(request).await?.into_inner().id) }
        });
        let id = id.await?;
        let wanted = v1::InstanceWanted::Running;
        let index = {
            let mut book = lock(&self.book);
            let (name, id) = (name.clone(), id.clone());
            book.records.push(Record { name, create_key: key, id, failover, wanted });
            book.records.len() - 1
        };
        let created = Created { index, name, id };
        let changes = self.dice.below(5);
        for _ in 0..changes {
            self.pause().await;
            if self.stopped() {
                return Some(());
            }
            let change = if self.dice.chance(50) { Change::Stop } else { Change::Start };
            self.change(&created, change).await?;
        }
        self.pause().await;
        if self.stopped() {
            return Some(());
        }
        let leaves = if self.dice.chance(70) { Some(created) } else { self.keep(created) };
        if let Some(leaves) = leaves {
            self.change(&leaves, Change::Delete).await?;
        }
        Some(())
    }

    /// Leaves an instance alone; what is to make room for it, if any.
    fn keep(&mut self, created: Created) -> Option<Created> {
        self.kept.push_back(created);
        if self.kept.len() > KEPT { self.kept.pop_front() } else { None }
    }

    async fn pause(&mut self) {
        let pause = self.dice.between(Duration::ZERO, self.options.pause);
        tokio::time::sleep(pause).await;
    }

    fn key(&mut self) -> String {
        self.calls += 1;
        format!("chaos-{}-{}-{}", std::process::id(), self.number, self.calls)
    }

    async fn change(&mut self, created: &Created, change: Change) -> Option<()> {
        let key = self.key();
        let what = format!("{change:?}");
        let answer = self.until_answered(&created.name, &what, |clients| {
            let (mut client, instance_id, request_key) = (clients.compute(), created.id.clone(), key.clone());
            async move {
                match change {
                    Change::Stop => {
                        let force = false;
                        let request =
                            v1::StopInstanceRequest { instance_id, force, timeout_seconds: 1, request_key };
                        client.stop_instance(request).await.map(drop)
                    }
                    Change::Start => {
                        let request = v1::StartInstanceRequest { instance_id, request_key };
                        client.start_instance(request).await.map(drop)
                    }
                    Change::Delete => {
                        let request = v1::DeleteInstanceRequest { instance_id, force: false, request_key };
                        client.delete_instance(request).await.map(drop)
                    }
                }
            }
        });
        answer.await?;
        lock(&self.book).records[created.index].wanted = match change {
            Change::Stop => v1::InstanceWanted::Stopped,
            Change::Start => v1::InstanceWanted::Running,
            Change::Delete => v1::InstanceWanted::Deleted,
        };
        Some(())
    }

    /// Calls with the same key through one server after another until there is an answer.
    async fn until_answered<T, F>(&mut self, name: &str, what: &str, call: impl Fn(Clients) -> F) -> Option<T>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let begin = Instant::now();
        loop {
            let server = self.dice.below(self.servers.len());
            let last = match tokio::time::timeout(TRY, call(self.servers[server].clone())).await {
                Ok(Ok(answer)) => {
                    let at = begin.duration_since(self.begin);
                    lock(&self.book).answered.push(Answered { at, took: begin.elapsed() });
                    return Some(answer);
                }
                Ok(Err(status)) if may_pass(&status) => status.to_string(),
                Ok(Err(status)) => {
                    let text = format!("{what} of {name} was refused by server {server}: {status}");
                    lock(&self.book).violations.push(text);
                    return None;
                }
                Err(_) => "no answer in time".to_owned(),
            };
            if begin.elapsed() > WEDGED {
                let text = format!("{what} of {name} has no answer after {WEDGED:?}; the last was: {last}");
                lock(&self.book).violations.push(text);
                return None;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Whether the same call may succeed later.
fn may_pass(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::Cancelled
            | Code::ResourceExhausted
            | Code::Unknown
    )
}
