//! `events`.

use std::collections::{HashSet, VecDeque};
use std::time::SystemTime;

use hv_proto::v1;
use tokio::time::Instant;

use super::Context;
use crate::cli::EventsArgs;
use crate::error::{CtlError, exit_code};
use crate::output::OutputFormat;
use crate::output::text::escape;
use crate::reference;
use crate::server::pause_before;
use crate::show::event::EventTable;

/// Events per page.
const PAGE_SIZE: u32 = 500;
/// How many events a description shows.
const DESCRIBED_EVENTS: u32 = 10;
/// How many events are remembered, so that one which both the list and the watch bring is printed once.
const REMEMBERED: usize = 4096;

/// The last events of one object, as the end of its description.
pub(super) async fn of(context: &Context, kind: &str, id: &str) -> Result<(), CtlError> {
    let filter = v1::ListEventsRequest {
        object_kind: kind.to_owned(),
        object_id: id.to_owned(),
        ..Default::default()
    };
    let events = list(context, &filter, DESCRIBED_EVENTS).await?;
    if events.is_empty() {
        return Ok(());
    }
    let output = crate::output::Output { format: OutputFormat::Table, ..context.output };
    let text = EventTable::new(output).render(&events, SystemTime::now());
    let indented: String = text.lines().map(|line| format!("  {line}\n")).collect();
    output.print(&format!("Events:\n{indented}"))
}

pub(super) async fn run(context: &Context, args: &EventsArgs) -> Result<u8, CtlError> {
    let mut filter = v1::ListEventsRequest { warnings_only: args.warnings, ..Default::default() };
    if let Some(object) = &args.object {
        filter.object_kind = object.kind.to_owned();
        filter.object_id = object_id(context, object).await?;
    }
    if args.watch {
        return watch(context, &filter, args.tail).await;
    }
    let events = list(context, &filter, args.tail).await?;
    match context.output.format {
        OutputFormat::Json | OutputFormat::Yaml => {
            let answer = v1::ListEventsResponse { events, ..Default::default() };
            context.output.message("the events", &answer)?;
        }
        OutputFormat::Name => names(context, &events)?,
        OutputFormat::Table | OutputFormat::Wide if events.is_empty() => context.note("no events found"),
        OutputFormat::Table | OutputFormat::Wide => {
            context.output.print(&EventTable::new(context.output).render(&events, SystemTime::now()))?;
        }
    }
    Ok(exit_code::OK)
}

/// The id of the object. One that is gone still has events: then what was typed is taken as the id.
pub(super) async fn object_id(
    context: &Context,
    object: &crate::cli::value::EventObject,
) -> Result<String, CtlError> {
    let found = match object.kind {
        "node" => reference::node(&context.server, &object.reference).await.map(|node| node.id),
        _ => reference::instance(&context.server, None, &object.reference).await.map(|instance| instance.id),
    };
    // A generated id has 36 characters; a name that nobody has is an error, a whole id may be of the past.
    match found {
        Err(CtlError::NotFound { .. }) if object.reference.len() == 36 => Ok(object.reference.clone()),
        other => other,
    }
}

/// The newest events that match, oldest first.
async fn list(
    context: &Context,
    filter: &v1::ListEventsRequest,
    most: u32,
) -> Result<Vec<v1::Event>, CtlError> {
    let server = &context.server;
    let mut events: Vec<v1::Event> = Vec::new();
    let mut request = filter.clone();
    let most = most as usize;
    while events.len() < most {
        request.page_size = i32::try_from((most - events.len()).min(PAGE_SIZE as usize)).unwrap_or(1);
        let page = server.call(async || server.cluster().list_events(request.clone()).await).await?;
        events.extend(page.events);
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            break;
        }
    }
    events.truncate(most);
    events.reverse();
    Ok(events)
}

fn names(context: &Context, events: &[v1::Event]) -> Result<(), CtlError> {
    let lines: String = events.iter().map(|event| format!("event/{}\n", escape(&event.id))).collect();
    context.output.print(&lines)
}

/// Prints the past, then what happens. The watch begins before the past is read, so nothing falls between.
async fn watch(context: &Context, filter: &v1::ListEventsRequest, tail: u32) -> Result<u8, CtlError> {
    let server = &context.server;
    let request = v1::WatchEventsRequest {
        object_kind: filter.object_kind.clone(),
        object_id: filter.object_id.clone(),
        warnings_only: filter.warnings_only,
        from_revision: 0,
        bookmarks: false,
    };
    let mut table = EventTable::for_watch(context.output);
    let mut printed = Printed::default();
    let mut stream = server.call(async || server.cluster().watch_events(request.clone()).await).await?;
    let mut past = tail;
    loop {
        let mut events = list(context, filter, past).await?;
        // What is older than the last one printed was left out on purpose. Ids sort by time.
        events.retain(|event| event.id > printed.newest);
        print(context, &mut table, printed.new_ones(events))?;
        while let Ok(Some(event)) = stream.message().await {
            print(context, &mut table, printed.new_ones(vec![event]))?;
        }
        // After an outage more may have happened than the user wanted to see of the past.
        past = PAGE_SIZE;
        stream = reopen(context, &request).await?;
    }
}

/// Opens the stream again, for at most the command's timeout.
async fn reopen(
    context: &Context,
    request: &v1::WatchEventsRequest,
) -> Result<tonic::Streaming<v1::Event>, CtlError> {
    let server = &context.server;
    let (since, mut attempt) = (Instant::now(), 1);
    loop {
        attempt += 1;
        tokio::time::sleep(pause_before(attempt)).await;
        match server.cluster().watch_events(request.clone()).await {
            Ok(opened) => return Ok(opened.into_inner()),
            Err(status) if status.code() == tonic::Code::Unavailable && since.elapsed() < server.timeout => {
                if attempt == 2 {
                    context.note("the server does not answer, trying again");
                }
            }
            Err(status) => return Err(server.error(&status)),
        }
    }
}

fn print(context: &Context, table: &mut EventTable, events: Vec<v1::Event>) -> Result<(), CtlError> {
    match context.output.format {
        _ if events.is_empty() => Ok(()),
        OutputFormat::Json | OutputFormat::Yaml => {
            events.iter().try_for_each(|event| context.output.event("the event", event))
        }
        OutputFormat::Name => names(context, &events),
        OutputFormat::Table | OutputFormat::Wide => {
            context.output.print(&table.render(&events, SystemTime::now()))
        }
    }
}

/// The last events that were printed.
#[derive(Debug, Default)]
struct Printed {
    ids: HashSet<String>,
    order: VecDeque<String>,
    /// The id that sorts last; empty before the first.
    newest: String,
}

impl Printed {
    fn new_ones(&mut self, events: Vec<v1::Event>) -> Vec<v1::Event> {
        let mut fresh = events;
        fresh.retain(|event| self.ids.insert(event.id.clone()));
        for event in &fresh {
            self.newest = self.newest.clone().max(event.id.clone());
            self.order.push_back(event.id.clone());
            if self.order.len() > REMEMBERED
                && let Some(oldest) = self.order.pop_front()
            {
                self.ids.remove(&oldest);
            }
        }
        fresh
    }
}
