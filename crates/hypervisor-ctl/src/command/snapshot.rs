//! `instance snapshot …`.

use std::time::SystemTime;

use hv_proto::v1;
use hv_types::InstanceType;

use super::{Context, operation};
use crate::cli::{NameArgs, SnapshotArgs, SnapshotCommand};
use crate::error::{CtlError, exit_code};
use crate::output::OutputFormat;
use crate::output::table::{Cell, Table};
use crate::output::text::{age, escape, size};
use crate::reference;
use crate::server::RequestKeys;

pub(super) async fn run(
    context: &Context,
    only: Option<InstanceType>,
    command: SnapshotCommand,
) -> Result<u8, CtlError> {
    let server = &context.server;
    match command {
        SnapshotCommand::List(args) => list(context, only, &args).await,
        SnapshotCommand::Create(args) => {
            let instance = reference::instance(server, only, &args.target.name).await?;
            let request = v1::CreateInstanceSnapshotRequest {
                instance_id: instance.id.clone(),
                name: args.target.snapshot.clone(),
                memory: args.memory,
                request_key: RequestKeys::new(&args.target.key).next(),
            };
            let begun = server
                .call(async || server.compute().create_instance_snapshot(request.clone()).await)
                .await?;
            follow(context, &args.target, &instance, begun, "is being taken").await
        }
        SnapshotCommand::Delete(args) => {
            let instance = reference::instance(server, only, &args.name).await?;
            let request = v1::DeleteInstanceSnapshotRequest {
                instance_id: instance.id.clone(),
                name: args.snapshot.clone(),
                request_key: RequestKeys::new(&args.key).next(),
            };
            let begun = server
                .call(async || server.compute().delete_instance_snapshot(request.clone()).await)
                .await?;
            follow(context, &args, &instance, begun, "is being deleted").await
        }
        SnapshotCommand::Revert(args) => {
            let instance = reference::instance(server, only, &args.name).await?;
            let request = v1::RevertInstanceRequest {
                instance_id: instance.id.clone(),
                name: args.snapshot.clone(),
                request_key: RequestKeys::new(&args.key).next(),
            };
            let begun = server.call(async || server.compute().revert_instance(request.clone()).await).await?;
            follow(context, &args, &instance, begun, "is being returned to").await
        }
    }
}

/// Follows the operation to its end, unless told not to.
async fn follow(
    context: &Context,
    args: &SnapshotArgs,
    instance: &v1::Instance,
    begun: v1::Operation,
    doing: &str,
) -> Result<u8, CtlError> {
    let name = escape(&instance.name);
    let for_people = context.output.format.is_for_people();
    if args.wait.no_wait {
        if for_people {
            let (snapshot, id) = (escape(&args.snapshot), escape(&begun.id));
            context.output.confirm(format!(
                "snapshot {snapshot} of instance {name} {doing}; follow it with `hypervisor-ctl operation watch {id}`"
            ))?;
        } else {
            operation::show(context, &begun)?;
        }
        return Ok(exit_code::OK);
    }
    let ended = operation::until_final(context, begun, false).await?;
    if !for_people {
        operation::show(context, &ended)?;
    } else if ended.state() == v1::OperationState::Succeeded {
        context.output.confirm(format!("instance {name}: {}", escape(&ended.message)))?;
    }
    operation::outcome(&ended)
}

async fn list(context: &Context, only: Option<InstanceType>, args: &NameArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let instance = reference::instance(server, only, &args.name).await?;
    let request = v1::ListInstanceSnapshotsRequest { instance_id: instance.id.clone() };
    let listed =
        server.call(async || server.compute().list_instance_snapshots(request.clone()).await).await?;
    match context.output.format {
        OutputFormat::Json | OutputFormat::Yaml => context.output.message("the snapshots", &listed)?,
        OutputFormat::Name => {
            for snapshot in &listed.snapshots {
                context.output.line(format!("snapshot/{}", escape(&snapshot.name)))?;
            }
        }
        OutputFormat::Table | OutputFormat::Wide if listed.snapshots.is_empty() => {
            context.note(&format!("instance {} has no snapshots", escape(&instance.name)));
        }
        OutputFormat::Table | OutputFormat::Wide => {
            let mut table = Table::new(vec!["NAME", "MEMORY", "SIZE", "AGE"], context.output.colours);
            let rows: Vec<Vec<Cell>> = listed.snapshots.iter().map(row).collect();
            context.output.print(&table.render(&rows))?;
        }
    }
    Ok(exit_code::OK)
}

fn row(snapshot: &v1::InstanceSnapshot) -> Vec<Cell> {
    vec![
        escape(&snapshot.name).into(),
        if snapshot.memory { "yes" } else { "no" }.into(),
        size(snapshot.size_bytes).into(),
        age(snapshot.created_at.as_ref(), SystemTime::now()).into(),
    ]
}
