//! `instance update`: asks for it, waits until the node has done it, and says what has to wait.

use hv_proto::v1::{self, InstanceState, InstanceWanted};
use hv_types::InstanceType;
use tokio::time::Instant;

use super::{Context, instance};
use crate::cli::{RenameArgs, RequestKeyArgs, RescueArgs, UnrescueArgs, UpdateArgs, WaitArgs};
use crate::error::{CtlError, exit_code};
use crate::output::text::escape;
use crate::reference::{self, noun};
use crate::server::RequestKeys;
use crate::wait::{Goal, Wait, deadline};

pub(super) async fn run(
    context: &Context,
    only: Option<InstanceType>,
    args: &UpdateArgs,
) -> Result<u8, CtlError> {
    let target = reference::instance(&context.server, only, &args.target).await?;
    let request = v1::UpdateInstanceRequest {
        instance_id: target.id.clone(),
        name: args.name.clone(),
        cpu_cores: args.cpus,
        memory_bytes: args.memory.map(|size| i64::try_from(size.bytes()).unwrap_or(i64::MAX)),
        set_disks: args.set_disk.clone(),
        remove_disks: args.remove_disk.clone(),
        rescue: None,
        if_revision: args.if_revision.unwrap_or_default(),
        request_key: RequestKeys::new(&args.key).next(),
    };
    let empty = v1::UpdateInstanceRequest {
        instance_id: request.instance_id.clone(),
        if_revision: request.if_revision,
        request_key: request.request_key.clone(),
        ..Default::default()
    };
    if request == empty {
        return Err(CtlError::Usage(
            "nothing to change; give --cpus, --memory, --name, --set-disk or --remove-disk".to_owned(),
        ));
    }
    finish(context, only, &request, &args.wait, ["is asked to change", "is changed"]).await
}

/// `instance rename`.
pub(super) async fn rename(
    context: &Context,
    only: Option<InstanceType>,
    args: &RenameArgs,
) -> Result<u8, CtlError> {
    let target = reference::instance(&context.server, only, &args.target).await?;
    let request = v1::UpdateInstanceRequest {
        instance_id: target.id,
        name: Some(args.new.clone()),
        request_key: RequestKeys::new(&args.key).next(),
        ..Default::default()
    };
    let was = escape(&target.name);
    let done = format!("was {was} until now");
    finish(context, only, &request, &args.wait, [&done, &done]).await
}

/// `instance rescue`.
pub(super) async fn rescue(
    context: &Context,
    only: Option<InstanceType>,
    args: &RescueArgs,
) -> Result<u8, CtlError> {
    if args.image.is_empty() {
        return Err(CtlError::Usage(
            "--image must name an image; see `hypervisor-ctl image list`".to_owned(),
        ));
    }
    let said = ["is asked to start in rescue", "runs in rescue; its own disks are behind the first one"];
    turn(context, only, (&args.target, &args.image), (&args.wait, &args.key), said).await
}

/// `instance unrescue`.
pub(super) async fn unrescue(
    context: &Context,
    only: Option<InstanceType>,
    args: &UnrescueArgs,
) -> Result<u8, CtlError> {
    let said = ["is asked to start from its own disks", "runs from its own disks"];
    turn(context, only, (&args.target, ""), (&args.wait, &args.key), said).await
}

/// Into rescue from an image, or out of it.
async fn turn(
    context: &Context,
    only: Option<InstanceType>,
    (target, image): (&str, &str),
    (wait, key): (&WaitArgs, &RequestKeyArgs),
    said: [&str; 2],
) -> Result<u8, CtlError> {
    let target = reference::instance(&context.server, only, target).await?;
    let request = v1::UpdateInstanceRequest {
        instance_id: target.id,
        rescue: Some(image.to_owned()),
        request_key: RequestKeys::new(key).next(),
        ..Default::default()
    };
    finish(context, only, &request, wait, said).await
}

/// Asks for it, and says what came of it: `asked` without waiting, `done` after it.
async fn finish(
    context: &Context,
    only: Option<InstanceType>,
    request: &v1::UpdateInstanceRequest,
    wait: &WaitArgs,
    [asked, done]: [&str; 2],
) -> Result<u8, CtlError> {
    let mut updated = ask(context, request).await?;
    let name = escape(&updated.name);
    if wait.no_wait {
        context.output.confirm(format!("instance {name} {asked}"))?;
    } else {
        updated = settled(context, updated, deadline(context.server.timeout)).await?;
        if request.rescue.is_some() && !updated.update_note.is_empty() {
            let why = escape(&updated.update_note);
            return Err(CtlError::Precondition(format!(
                "instance {name} runs as before: {why}; `hypervisor-ctl instance unrescue {name}` takes the request back"
            )));
        }
        context.output.confirm(format!("instance {name} {done}"))?;
        if !updated.update_note.is_empty() {
            context.note(&format!("it takes effect at the next start: {}", escape(&updated.update_note)));
        }
    }
    if !context.output.format.is_for_people() {
        instance::print(context, noun(only), vec![updated])?;
    }
    Ok(exit_code::OK)
}

/// Sends the request; it must have a request key.
pub(super) async fn ask(
    context: &Context,
    request: &v1::UpdateInstanceRequest,
) -> Result<v1::Instance, CtlError> {
    let server = &context.server;
    server.call(async || server.compute().update_instance(request.clone()).await).await
}

/// Waits until its node has finished with it. What no node has, or has failed already, is not waited for.
pub(super) async fn settled(
    context: &Context,
    updated: v1::Instance,
    end: Instant,
) -> Result<v1::Instance, CtlError> {
    let goal = match updated.wanted() {
        InstanceWanted::Paused => Goal::Paused,
        InstanceWanted::Stopped => Goal::Stopped,
        InstanceWanted::Running | InstanceWanted::Unspecified => Goal::Running,
        InstanceWanted::Deleted => return Ok(updated),
    };
    if updated.node_id.is_empty() || updated.state() == InstanceState::Unknown {
        return Ok(updated);
    }
    let mut progress = context.progress();
    let generation = updated.generation;
    let wait = Wait { server: &context.server, progress: &mut progress, goal, generation, instance: updated };
    Box::pin(wait.until(end)).await
}
