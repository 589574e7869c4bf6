//! `--watch` of instances and nodes.
//!
//! # Theory of operation
//! A watch without a revision sends what there is, a bookmark, then each change. Up to the first bookmark everything is
//! collected and printed as one table; when the stream breaks, it is resumed after the last revision seen, or begun anew
//! where that is no longer kept. What is known is kept by id: a deletion names the id only, and what was printed already
//! is not printed again.

use std::collections::BTreeMap;
use std::time::SystemTime;

use hv_proto::v1::{self, EventType};
use serde::Serialize;
use tokio::time::Instant;
use tonic::{Code, Response, Status, Streaming};

use super::Context;
use crate::error::{CtlError, exit_code};
use crate::output::OutputFormat;
use crate::output::text::escape;
use crate::server::pause_before;
use crate::show::instance::InstanceTable;
use crate::show::node::NodeTable;

/// An object that can be watched.
trait Watched: Clone {
    type Event: Serialize;
    /// Kind of change, object, revision.
    fn split(event: &Self::Event) -> (EventType, Option<&Self>, u64);
    fn id(&self) -> &str;
    fn name(&self) -> &str;
    fn revision(&self) -> u64;
}

impl Watched for v1::Instance {
    type Event = v1::InstanceEvent;

    fn split(event: &v1::InstanceEvent) -> (EventType, Option<&Self>, u64) {
        (event.r#type(), event.instance.as_ref(), event.revision)
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn revision(&self) -> u64 {
        self.revision
    }
}

impl Watched for v1::Node {
    type Event = v1::NodeEvent;

    fn split(event: &v1::NodeEvent) -> (EventType, Option<&Self>, u64) {
        (event.r#type(), event.node.as_ref(), event.revision)
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn name(&self) -> &str {
        &self.hostname
    }

    fn revision(&self) -> u64 {
        self.revision
    }
}

/// Where rows come from.
trait Rows<T> {
    fn rows(&mut self, objects: &[T]) -> String;
    fn gone(&mut self, object: &T) -> String;
}

impl Rows<v1::Instance> for InstanceTable {
    fn rows(&mut self, objects: &[v1::Instance]) -> String {
        self.render(objects, SystemTime::now())
    }

    fn gone(&mut self, object: &v1::Instance) -> String {
        InstanceTable::gone(self, object, SystemTime::now())
    }
}

impl Rows<v1::Node> for NodeTable {
    fn rows(&mut self, objects: &[v1::Node]) -> String {
        self.render(objects, SystemTime::now())
    }

    fn gone(&mut self, object: &v1::Node) -> String {
        NodeTable::gone(self, object, SystemTime::now())
    }
}

pub(super) async fn instances(
    context: &Context,
    noun: &str,
    filter: &v1::ListInstancesRequest,
) -> Result<u8, CtlError> {
    let state = filter.state;
    let watch = Watch {
        context,
        noun,
        rows: InstanceTable::for_watch(context.output),
        // The watch cannot be asked for a state.
        keep: move |instance: &v1::Instance| state == 0 || instance.state == state,
        known: BTreeMap::new(),
        initial: Some(BTreeMap::new()),
        last_revision: 0,
        ends_with_deletion: false,
    };
    let request = |from_revision| v1::WatchInstancesRequest {
        r#type: filter.r#type,
        node_id: filter.node_id.clone(),
        label_selector: filter.label_selector.clone(),
        project: filter.project.clone(),
        from_revision,
    };
    watch.run(async |from| context.server.compute().watch_instances(request(from)).await).await
}

pub(super) async fn instance(context: &Context, noun: &str, target: &v1::Instance) -> Result<u8, CtlError> {
    let watch = Watch {
        context,
        noun,
        rows: InstanceTable::for_watch(context.output),
        keep: |_: &v1::Instance| true,
        known: BTreeMap::new(),
        // One object needs no table of its own.
        initial: None,
        last_revision: 0,
        ends_with_deletion: true,
    };
    let request = |from_revision| v1::WatchInstanceRequest { instance_id: target.id.clone(), from_revision };
    watch.run(async |from| context.server.compute().watch_instance(request(from)).await).await
}

pub(super) async fn nodes(context: &Context, filter: &v1::ListNodesRequest) -> Result<u8, CtlError> {
    let (status, selector) = (filter.status, filter.label_selector.clone());
    // The watch cannot be asked for a status or for labels.
    let keep = move |node: &v1::Node| {
        let labels = node.metadata.as_ref().map(|metadata| &metadata.labels);
        let has = |(key, value): (&String, &String)| {
            let found = labels.and_then(|labels| labels.get(key));
            found.is_some_and(|found| value == hv_types::Selector::ANY || found == value)
        };
        (status == 0 || node.status == status) && selector.iter().all(has)
    };
    watch_nodes(context, filter, keep, false).await
}

pub(super) async fn node(context: &Context, target: &v1::Node) -> Result<u8, CtlError> {
    let id = target.id.clone();
    watch_nodes(context, &v1::ListNodesRequest::default(), move |node: &v1::Node| node.id == id, true).await
}

async fn watch_nodes(
    context: &Context,
    filter: &v1::ListNodesRequest,
    keep: impl Fn(&v1::Node) -> bool,
    ends_with_deletion: bool,
) -> Result<u8, CtlError> {
    let watch = Watch {
        context,
        noun: "node",
        rows: NodeTable::for_watch(context.output),
        keep,
        known: BTreeMap::new(),
        initial: Some(BTreeMap::new()),
        last_revision: 0,
        ends_with_deletion,
    };
    let request = |from_revision| v1::WatchNodesRequest {
        role: 0,
        region: filter.region.clone(),
        zone: filter.zone.clone(),
        from_revision,
    };
    watch.run(async |from| context.server.cluster().watch_nodes(request(from)).await).await
}

struct Watch<'a, T: Watched, R: Rows<T>, K: Fn(&T) -> bool> {
    context: &'a Context,
    noun: &'a str,
    rows: R,
    keep: K,
    /// What was printed last, by id.
    known: BTreeMap<String, T>,
    /// Collects what there is until the first bookmark.
    initial: Option<BTreeMap<String, T>>,
    last_revision: u64,
    ends_with_deletion: bool,
}

impl<T: Watched, R: Rows<T>, K: Fn(&T) -> bool> Watch<'_, T, R, K> {
    async fn run(
        mut self,
        open: impl AsyncFn(u64) -> Result<Response<Streaming<T::Event>>, Status>,
    ) -> Result<u8, CtlError> {
        let server = &self.context.server;
        let mut stream = server.call(async || open(0).await).await?;
        loop {
            let broken = loop {
                match stream.message().await {
                    Ok(Some(event)) => {
                        if self.take(&event)? {
                            return Ok(exit_code::OK);
                        }
                    }
                    Ok(None) => break Status::unavailable("the watch ended"),
                    Err(status) => break status,
                }
            };
            stream = self.reopen(&open, broken).await?;
        }
    }

    /// Opens the stream again, for at most the command's timeout.
    async fn reopen(
        &mut self,
        open: impl AsyncFn(u64) -> Result<Response<Streaming<T::Event>>, Status>,
        mut broken: Status,
    ) -> Result<Streaming<T::Event>, CtlError> {
        let server = &self.context.server;
        let (since, mut attempt) = (Instant::now(), 1);
        loop {
            match broken.code() {
                Code::OutOfRange => {
                    self.last_revision = 0;
                    self.initial = Some(BTreeMap::new());
                }
                Code::Unavailable | Code::Cancelled | Code::Unknown | Code::Aborted | Code::Internal
                    if since.elapsed() < server.timeout =>
                {
                    if attempt == 2 {
                        self.context.note("the server does not answer, trying again");
                    }
                }
                _ => return Err(server.error(&broken)),
            }
            attempt += 1;
            tokio::time::sleep(pause_before(attempt)).await;
            let from = if self.last_revision == 0 { 0 } else { self.last_revision + 1 };
            match open(from).await {
                Ok(stream) => return Ok(stream.into_inner()),
                Err(status) => broken = status,
            }
        }
    }

    /// Takes one event; true if the watch is over.
    fn take(&mut self, event: &T::Event) -> Result<bool, CtlError> {
        let (kind, object, revision) = T::split(event);
        self.last_revision = self.last_revision.max(revision);
        match (kind, object) {
            (EventType::Bookmark, _) => {
                if let Some(initial) = self.initial.take() {
                    self.begin(initial)?;
                }
            }
            (EventType::Deleted, Some(object)) => {
                if let Some(initial) = &mut self.initial {
                    initial.remove(object.id());
                }
                if let Some(known) = self.known.remove(object.id()) {
                    self.print_gone(&known, Some(event))?;
                    return Ok(self.ends_with_deletion);
                }
            }
            (_, Some(object)) if (self.keep)(object) => {
                let streams = self.streams();
                match &mut self.initial {
                    Some(initial) if !streams => {
                        initial.insert(object.id().to_owned(), object.clone());
                    }
                    _ => self.print_changed(object, event)?,
                }
            }
            (_, Some(object)) => {
                // It stopped to match.
                if let Some(known) = self.known.remove(object.id()) {
                    self.print_changed_row(&known, object)?;
                }
            }
            (_, None) => {}
        }
        Ok(false)
    }

    /// Whether each event is printed as it comes: machines want no table.
    fn streams(&self) -> bool {
        matches!(self.context.output.format, OutputFormat::Json | OutputFormat::Yaml)
    }

    /// Prints what there is.
    fn begin(&mut self, initial: BTreeMap<String, T>) -> Result<(), CtlError> {
        if self.streams() {
            return Ok(());
        }
        let gone: Vec<T> = self
            .known
            .iter()
            .filter(|(id, _)| !initial.contains_key(*id))
            .map(|(_, known)| known.clone())
            .collect();
        for object in gone {
            self.known.remove(object.id());
            self.print_gone(&object, None)?;
        }
        let is_new = |object: &T| {
            self.known.get(object.id()).is_none_or(|known| known.revision() != object.revision())
        };
        let fresh: Vec<T> = initial.into_values().filter(is_new).collect();
        self.print_rows(&fresh)?;
        self.known.extend(fresh.into_iter().map(|object| (object.id().to_owned(), object)));
        Ok(())
    }

    fn print_changed(&mut self, object: &T, event: &T::Event) -> Result<(), CtlError> {
        self.known.insert(object.id().to_owned(), object.clone());
        if self.streams() {
            return self.context.output.event("the event", event);
        }
        self.print_rows(std::slice::from_ref(object))
    }

    /// One last row for an object that the filter no longer wants.
    fn print_changed_row(&mut self, known: &T, now: &T) -> Result<(), CtlError> {
        if self.streams() || known.revision() == now.revision() {
            return Ok(());
        }
        self.print_rows(std::slice::from_ref(now))
    }

    fn print_rows(&mut self, objects: &[T]) -> Result<(), CtlError> {
        if self.context.output.format == OutputFormat::Name {
            let lines: String =
                objects.iter().map(|object| format!("{}/{}\n", self.noun, escape(object.name()))).collect();
            return self.context.output.print(&lines);
        }
        let text = self.rows.rows(objects);
        self.context.output.print(&text)
    }

    fn print_gone(&mut self, object: &T, event: Option<&T::Event>) -> Result<(), CtlError> {
        match (self.context.output.format, event) {
            (OutputFormat::Json | OutputFormat::Yaml, Some(event)) => {
                self.context.output.event("the event", event)
            }
            (OutputFormat::Json | OutputFormat::Yaml | OutputFormat::Name, _) => Ok(()),
            (OutputFormat::Table | OutputFormat::Wide, _) => {
                let text = self.rows.gone(object);
                self.context.output.print(&text)
            }
        }
    }
}
