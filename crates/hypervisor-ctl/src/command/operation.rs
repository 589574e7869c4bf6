//! `operation …`, and following an operation that another command began.

use std::time::SystemTime;

use hv_proto::v1::{self, OperationState};
use tokio::time::Instant;

use super::{Context, events};
use crate::cli::{OperationArgs, OperationCommand, OperationListArgs};
use crate::error::{CtlError, exit_code};
use crate::output::OutputFormat;
use crate::output::text::escape;
use crate::server::{RequestKeys, Server, pause_before};
use crate::show::operation::{OperationTable, describe, is_final, line};
use crate::wait::deadline;

/// Operations per page.
const PAGE_SIZE: u32 = 500;
/// The phase of an operation that cannot go on by itself.
const BLOCKED: &str = "blocked";

pub(super) async fn run(context: &Context, command: OperationCommand) -> Result<u8, CtlError> {
    match command {
        OperationCommand::List(args) => list(context, &args).await,
        OperationCommand::Get(args) => {
            let operation = find(&context.server, &args).await?;
            show(context, &operation)?;
            Ok(exit_code::OK)
        }
        OperationCommand::Watch(args) => {
            let operation = find(&context.server, &args).await?;
            let ended = until_final(context, operation, false).await?;
            show(context, &ended)?;
            outcome(&ended)
        }
        OperationCommand::Cancel(args) => {
            let operation = find(&context.server, &args.target).await?;
            let request = v1::CancelOperationRequest {
                operation_id: operation.id,
                request_key: RequestKeys::new(&args.key).next(),
            };
            let server = &context.server;
            let asked =
                server.call(async || server.operations().cancel_operation(request.clone()).await).await?;
            show(context, &asked)?;
            Ok(exit_code::OK)
        }
    }
}

async fn list(context: &Context, args: &OperationListArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let object_id = match &args.object {
        Some(object) => events::object_id(context, object).await?,
        None => String::new(),
    };
    let most = args.tail as usize;
    let mut all = v1::ListOperationsResponse::default();
    loop {
        let left = u32::try_from(most - all.operations.len()).unwrap_or(PAGE_SIZE);
        let request = v1::ListOperationsRequest {
            object_id: object_id.clone(),
            active_only: args.active,
            page_size: i32::try_from(left.min(PAGE_SIZE)).unwrap_or(1),
            page_token: std::mem::take(&mut all.next_page_token),
            ..Default::default()
        };
        let page = server.call(async || server.operations().list_operations(request.clone()).await).await?;
        all.revision = if all.operations.is_empty() { page.revision } else { all.revision };
        all.operations.extend(page.operations);
        if page.next_page_token.is_empty() || all.operations.len() >= most {
            break;
        }
        all.next_page_token = page.next_page_token;
    }
    match context.output.format {
        OutputFormat::Json | OutputFormat::Yaml => context.output.message("the operations", &all)?,
        OutputFormat::Name => {
            for operation in &all.operations {
                context.output.line(format!("operation/{}", escape(&operation.id)))?;
            }
        }
        OutputFormat::Table | OutputFormat::Wide if all.operations.is_empty() => {
            context.note("no operations found");
        }
        OutputFormat::Table | OutputFormat::Wide => {
            let mut table = OperationTable::new(context.output);
            context.output.print(&table.render(&all.operations, SystemTime::now()))?;
        }
    }
    Ok(exit_code::OK)
}

/// The operation that an id, or the beginning of one, means.
async fn find(server: &Server, args: &OperationArgs) -> Result<v1::Operation, CtlError> {
    let bare = args.id.strip_prefix("operation/").unwrap_or(&args.id);
    let request = v1::GetOperationRequest { operation_id: bare.to_owned() };
    match server.call(async || server.operations().get_operation(request.clone()).await).await {
        Err(CtlError::Service(error)) if error.code() == hv_types::ErrorCode::NotFound => {}
        answer => return answer,
    }
    let request = v1::ListOperationsRequest { page_size: 1000, ..Default::default() };
    let page = server.call(async || server.operations().list_operations(request.clone()).await).await?;
    let mut fitting = page.operations.into_iter().filter(|operation| operation.id.starts_with(bare));
    match (fitting.next(), fitting.next()) {
        (Some(operation), None) => Ok(operation),
        (Some(first), Some(second)) => Err(CtlError::Ambiguous {
            kind: "operation",
            reference: bare.to_owned(),
            candidates: format!("  {}\n  {}", escape(&first.id), escape(&second.id)),
        }),
        (None, _) => Err(CtlError::NotFound { kind: "operation", reference: bare.to_owned() }),
    }
}

pub(super) fn show(context: &Context, operation: &v1::Operation) -> Result<(), CtlError> {
    match context.output.format {
        OutputFormat::Json | OutputFormat::Yaml => context.output.message("the operation", operation),
        OutputFormat::Name => context.output.line(format!("operation/{}", escape(&operation.id))),
        OutputFormat::Table | OutputFormat::Wide => {
            context.output.print(&describe(operation, context.output).text())
        }
    }
}

/// Shows the progress of an operation until it ends; or, where `or_blocked`, until it cannot go on by itself.
pub(super) async fn until_final(
    context: &Context,
    mut operation: v1::Operation,
    or_blocked: bool,
) -> Result<v1::Operation, CtlError> {
    let server = &context.server;
    let end = deadline(server.timeout);
    let mut progress = context.progress();
    let mut attempt = 1;
    loop {
        progress.update(&line(&operation));
        if is_final(operation.state()) || (or_blocked && operation.phase == BLOCKED) {
            return Ok(operation);
        }
        attempt += 1;
        let pause = pause_before(attempt);
        if Instant::now() + pause >= end {
            let id = escape(&operation.id);
            return Err(CtlError::TimedOut {
                what: format!("operation {id} has not ended: {}", escape(&operation.message)),
                after: server.timeout,
                hint: format!("; it goes on, follow it with `hypervisor-ctl operation watch {id}`"),
            });
        }
        tokio::time::sleep(pause).await;
        let request = v1::GetOperationRequest { operation_id: operation.id.clone() };
        let next = server.call(async || server.operations().get_operation(request.clone()).await).await?;
        if next.revision != operation.revision {
            attempt = 1;
        }
        operation = next;
    }
}

/// What an operation that has ended comes to.
pub(super) fn outcome(operation: &v1::Operation) -> Result<u8, CtlError> {
    let id = escape(&operation.id);
    match operation.state() {
        OperationState::Succeeded => Ok(exit_code::OK),
        OperationState::Cancelled => Err(CtlError::Overtaken(format!("operation {id} was cancelled"))),
        _ => Err(CtlError::Precondition(format!("operation {id} failed: {}", escape(&operation.message)))),
    }
}
