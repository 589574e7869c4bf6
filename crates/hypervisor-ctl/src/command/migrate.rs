//! `instance migrate`: to another node while it runs.

use hv_config::ByteSize;
use hv_proto::v1;
use hv_types::InstanceType;

use super::{Context, operation};
use crate::cli::MigrateArgs;
use crate::error::{CtlError, exit_code};
use crate::output::OutputFormat;
use crate::output::text::escape;
use crate::reference;
use crate::server::RequestKeys;

pub(super) async fn run(
    context: &Context,
    only: Option<InstanceType>,
    args: &MigrateArgs,
) -> Result<u8, CtlError> {
    let server = &context.server;
    let instance = reference::instance(server, only, &args.name).await?;
    let target_node_id = match &args.to {
        Some(name) => reference::node(server, name).await?.id,
        None => String::new(),
    };
    let downtime = args.downtime_limit.map_or(0, |limit| limit.get().as_millis().max(1));
    let give_up = args.give_up_after.map_or(0, |after| after.get().as_secs().max(1));
    let request = v1::MigrateInstanceRequest {
        instance_id: instance.id.clone(),
        target_node_id,
        copy_storage: args.copy_storage,
        // What is beyond the server's bounds is refused there.
        downtime_limit_ms: u32::try_from(downtime).unwrap_or(u32::MAX),
        bandwidth_limit: args.bandwidth.map_or(0, ByteSize::bytes),
        timeout_seconds: u32::try_from(give_up).unwrap_or(u32::MAX),
        request_key: RequestKeys::new(&args.key).next(),
    };
    let begun = server.call(async || server.compute().migrate_instance(request.clone()).await).await?;
    let name = escape(&instance.name);
    if args.wait.no_wait {
        if matches!(context.output.format, OutputFormat::Table | OutputFormat::Wide) {
            let id = escape(&begun.id);
            context.output.confirm(format!(
                "instance {name} is being moved; follow it with `hypervisor-ctl operation watch {id}`"
            ))?;
        } else {
            operation::show(context, &begun)?;
        }
        return Ok(exit_code::OK);
    }
    let ended = operation::until_final(context, begun, false).await?;
    match context.output.format {
        OutputFormat::Table | OutputFormat::Wide if ended.state() == v1::OperationState::Succeeded => {
            context.output.confirm(format!("instance {name}: {}", escape(&ended.message)))?;
        }
        OutputFormat::Table | OutputFormat::Wide => {}
        OutputFormat::Json | OutputFormat::Yaml | OutputFormat::Name => operation::show(context, &ended)?,
    }
    operation::outcome(&ended)
}
