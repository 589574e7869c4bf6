//! `start`, `stop`, `restart`, `pause`, `resume`, `delete`: asks for it, then waits until it is so.

use std::time::Duration;

use hv_proto::v1;
use hv_types::InstanceType;
use tokio::time::Instant;

use super::{Context, instance};
use crate::cli::NamesArgs;
use crate::error::{CtlError, exit_code};
use crate::output::text::escape;
use crate::reference::{self, noun};
use crate::server::RequestKeys;
use crate::show::instance::state_name;
use crate::wait::{Goal, Wait, deadline};

/// What is asked of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Start,
    Stop { force: bool, timeout_seconds: i32 },
    Restart { force: bool },
    Pause,
    Resume,
    Delete { force: bool, ignore_not_found: bool },
}

impl Verb {
    pub(crate) fn goal(self) -> Goal {
        match self {
            Self::Start | Self::Restart { .. } | Self::Resume => Goal::Running,
            Self::Stop { .. } => Goal::Stopped,
            Self::Pause => Goal::Paused,
            Self::Delete { .. } => Goal::Deleted,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop { .. } => "stop",
            Self::Restart { .. } => "restart",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Delete { .. } => "delete",
        }
    }
}

pub(super) async fn run(
    context: &Context,
    only: Option<InstanceType>,
    args: &NamesArgs,
    verb: Verb,
) -> Result<u8, CtlError> {
    let server = &context.server;
    let mut targets: Vec<v1::Instance> = Vec::new();
    for name in &args.names {
        match (reference::instance(server, only, name).await, verb) {
            (Ok(target), _) if targets.iter().all(|known| known.id != target.id) => targets.push(target),
            (Ok(_), _) | (Err(CtlError::NotFound { .. }), Verb::Delete { ignore_not_found: true, .. }) => {}
            (Err(error), _) => return Err(error),
        }
    }
    let mut keys = RequestKeys::new(&args.key);
    let mut asked = Vec::new();
    for target in targets {
        asked.push(ask(context, &target, verb, keys.next()).await?);
    }

    let (began, end) = (Instant::now(), deadline(server.timeout));
    let mut done = Vec::new();
    for target in asked {
        done.push(settle(context, target, verb, args.wait.no_wait, (began, end)).await?);
    }
    if !context.output.format.is_for_people() && !done.is_empty() {
        instance::print(context, noun(only), done)?;
    }
    Ok(exit_code::OK)
}

/// Sends one request; the answer carries the generation to wait for.
pub(crate) async fn ask(
    context: &Context,
    target: &v1::Instance,
    verb: Verb,
    request_key: String,
) -> Result<v1::Instance, CtlError> {
    let server = &context.server;
    let (id, key) = (|| target.id.clone(), || request_key.clone());
    let compute = || server.compute();
    let asked = match verb {
        Verb::Start => {
            let request = || v1::StartInstanceRequest { instance_id: id(), request_key: key() };
            server.call(async || compute().start_instance(request()).await).await
        }
        Verb::Stop { force, timeout_seconds } => {
            let request =
                || v1::StopInstanceRequest { instance_id: id(), force, timeout_seconds, request_key: key() };
            server.call(async || compute().stop_instance(request()).await).await
        }
        Verb::Restart { force } => {
            let request = || v1::RestartInstanceRequest { instance_id: id(), force, request_key: key() };
            server.call(async || compute().restart_instance(request()).await).await
        }
        Verb::Pause => {
            let request = || v1::PauseInstanceRequest { instance_id: id(), request_key: key() };
            server.call(async || compute().pause_instance(request()).await).await
        }
        Verb::Resume => {
            let request = || v1::ResumeInstanceRequest { instance_id: id(), request_key: key() };
            server.call(async || compute().resume_instance(request()).await).await
        }
        Verb::Delete { force, .. } => {
            let request = || v1::DeleteInstanceRequest { instance_id: id(), force, request_key: key() };
            server.call(async || compute().delete_instance(request()).await).await.map(|_| target.clone())
        }
    };
    asked.map_err(|error| name_it(error, verb, target))
}

/// A refusal says which of several instances it is about.
fn name_it(error: CtlError, verb: Verb, target: &v1::Instance) -> CtlError {
    let CtlError::Service(error) = error else { return error };
    if error.message().contains(&target.name) || error.code() == hv_types::ErrorCode::Unavailable {
        return CtlError::Service(error);
    }
    let text = format!("cannot {} instance {}: {}", verb.name(), target.name, error.message());
    CtlError::Service(hv_types::ServiceError::new(error.code(), text))
}

/// Waits, unless told not to, and confirms.
async fn settle(
    context: &Context,
    target: v1::Instance,
    verb: Verb,
    no_wait: bool,
    (began, end): (Instant, Instant),
) -> Result<v1::Instance, CtlError> {
    let goal = verb.goal();
    if no_wait {
        let name = escape(&target.name);
        context.output.confirm(format!("instance {name} is asked to be {}", goal.word()))?;
        return Ok(target);
    }
    let mut progress = context.progress();
    let generation = target.generation;
    let wait = Wait { server: &context.server, progress: &mut progress, goal, generation, instance: target };
    let settled = Box::pin(wait.until(end)).await?;
    context.output.confirm(confirmation(&settled, goal, began.elapsed()))?;
    Ok(settled)
}

/// What became of an instance, in one line.
pub(crate) fn confirmation(instance: &v1::Instance, goal: Goal, took: Duration) -> String {
    let name = escape(&instance.name);
    let seconds = took.as_secs_f32();
    if goal == Goal::Deleted {
        return format!("instance {name} is deleted ({seconds:.1}s)");
    }
    let mut text = format!("instance {name} is {}", state_name(instance.state()));
    if goal == Goal::Running && !instance.node_id.is_empty() {
        text.push_str(&format!(" on node {}", escape(&instance.node_id)));
    }
    if goal == Goal::Running && !instance.ip_address.is_empty() {
        text.push_str(&format!(" at {}", escape(&instance.ip_address)));
    }
    format!("{text} ({seconds:.1}s)")
}
