//! `apply`: plans everything first, then carries it out document by document.

use hv_proto::v1;
use hv_types::instance::DEFAULT_PROJECT;
use serde::Serialize;
use tokio::time::Instant;

use super::{Context, change, create};
use crate::apply::document::Desired;
use crate::apply::plan::{Plan, plan};
use crate::cli::{ApplyArgs, RequestKeyArgs};
use crate::error::{CtlError, exit_code};
use crate::output::OutputFormat;
use crate::output::text::escape;
use crate::reference;
use crate::server::RequestKeys;
use crate::wait::{Goal, Wait, deadline};

/// How often an update is compared anew because somebody else changed the instance meanwhile.
const MAX_CONFLICTS: u32 = 5;

/// What became of a document.
#[derive(Debug, Serialize)]
struct Outcome {
    name: String,
    action: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    changes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Outcomes {
    results: Vec<Outcome>,
}

pub(super) async fn run(context: &Context, args: &ApplyArgs) -> Result<u8, CtlError> {
    let documents = crate::apply::read(&args.filename)?;
    let mut planned = Vec::new();
    for desired in documents {
        let existing = find(context, &desired).await?;
        let plan = plan(&desired, existing.as_ref())?;
        planned.push((desired, existing, plan));
    }
    let mut results = Vec::new();
    for (desired, existing, plan) in planned {
        let outcome = Outcome {
            name: desired.name.clone(),
            action: action(&plan, args.dry_run),
            changes: plan.changes.clone(),
        };
        if !args.dry_run && !plan.is_empty() {
            carry_out(context, args, &desired, existing, plan).await?;
        }
        report(context, args, &outcome)?;
        results.push(outcome);
    }
    if matches!(context.output.format, OutputFormat::Json | OutputFormat::Yaml) {
        context.output.message("the results", &Outcomes { results })?;
    }
    Ok(exit_code::OK)
}

fn action(plan: &Plan, dry_run: bool) -> &'static str {
    match (plan.create, plan.is_empty(), dry_run) {
        (_, true, _) => "unchanged",
        (true, false, false) => "created",
        (true, false, true) => "would be created",
        (false, false, false) => "configured",
        (false, false, true) => "would be configured",
    }
}

fn report(context: &Context, args: &ApplyArgs, outcome: &Outcome) -> Result<(), CtlError> {
    let name = escape(&outcome.name);
    match context.output.format {
        OutputFormat::Json | OutputFormat::Yaml => Ok(()),
        OutputFormat::Name => context.output.line(format!("instance/{name}")),
        OutputFormat::Table | OutputFormat::Wide if args.dry_run && !outcome.changes.is_empty() => {
            let lines: String = outcome.changes.iter().map(|change| format!("  {change}\n")).collect();
            context.output.print(&format!("instance/{name} {}:\n{lines}", outcome.action))
        }
        OutputFormat::Table | OutputFormat::Wide => {
            context.output.confirm(format!("instance/{name} {}", outcome.action))
        }
    }
}

/// The instance of this name, if there is one.
async fn find(context: &Context, desired: &Desired) -> Result<Option<v1::Instance>, CtlError> {
    if desired.name.is_empty() {
        return Ok(None);
    }
    let server = &context.server;
    let project = if desired.project.is_empty() { DEFAULT_PROJECT } else { &desired.project };
    let request = v1::ListInstancesRequest {
        reference: desired.name.clone(),
        project: project.to_owned(),
        ..Default::default()
    };
    let found = server.call(async || server.compute().list_instances(request.clone()).await).await?;
    Ok(found.instances.into_iter().find(|instance| instance.name == desired.name))
}

async fn carry_out(
    context: &Context,
    args: &ApplyArgs,
    desired: &Desired,
    existing: Option<v1::Instance>,
    plan: Plan,
) -> Result<(), CtlError> {
    let mut keys = RequestKeys::new(&RequestKeyArgs::default());
    let end = deadline(context.server.timeout);
    let mut instance = match existing {
        Some(existing) => update(context, desired, existing, plan.metadata.is_some(), &mut keys).await?,
        None => {
            let mut request = desired.request.clone();
            request.request_key = keys.next();
            if !request.preferred_node_id.is_empty() {
                request.preferred_node_id =
                    reference::node(&context.server, &request.preferred_node_id).await?.id;
            }
            create::create(context, &request).await?
        }
    };
    if let Some(change) = plan.update {
        let request = v1::UpdateInstanceRequest {
            instance_id: instance.id.clone(),
            request_key: keys.next(),
            ..change
        };
        instance = super::update::ask(context, &request).await?;
        if !args.wait.no_wait {
            instance = super::update::settled(context, instance, end).await?;
        }
        if !instance.update_note.is_empty() {
            let (name, note) = (escape(&instance.name), escape(&instance.update_note));
            context.note(&format!("instance {name}: it takes effect at the next start: {note}"));
        }
    }
    // Only a running instance can be paused; to stop one it need not run first.
    let runs_first = plan.create && !plan.verbs.iter().any(|verb| verb.goal() == Goal::Stopped);
    let steps = plan.verbs.len();
    if runs_first && (!args.wait.no_wait || steps > 0) {
        instance = settled(context, instance, Goal::Running, end).await?;
    }
    for (step, verb) in plan.verbs.into_iter().enumerate() {
        instance = change::ask(context, &instance, verb, keys.next()).await?;
        if !args.wait.no_wait || step + 1 < steps {
            instance = settled(context, instance, verb.goal(), end).await?;
        }
    }
    Ok(())
}

async fn settled(
    context: &Context,
    instance: v1::Instance,
    goal: Goal,
    end: Instant,
) -> Result<v1::Instance, CtlError> {
    let mut progress = context.progress();
    let generation = instance.generation;
    let wait = Wait { server: &context.server, progress: &mut progress, goal, generation, instance };
    Box::pin(wait.until(end)).await
}

/// Writes labels and annotations if they still differ, over the instance as it was compared.
async fn update(
    context: &Context,
    desired: &Desired,
    mut existing: v1::Instance,
    mut differs: bool,
    keys: &mut RequestKeys,
) -> Result<v1::Instance, CtlError> {
    let server = &context.server;
    let mut conflicts = 0;
    while differs {
        let metadata = plan(desired, Some(&existing))?.metadata;
        let request = v1::UpdateInstanceMetadataRequest {
            instance_id: existing.id.clone(),
            metadata,
            if_revision: existing.revision,
            request_key: keys.next(),
        };
        match server.call(async || server.compute().update_instance_metadata(request.clone()).await).await {
            Ok(updated) => return Ok(updated),
            Err(CtlError::Service(error))
                if error.code() == hv_types::ErrorCode::Conflict && conflicts < MAX_CONFLICTS =>
            {
                conflicts += 1;
            }
            Err(error) => return Err(error),
        }
        let request = v1::GetInstanceRequest { instance_id: existing.id.clone() };
        existing = server.call(async || server.compute().get_instance(request.clone()).await).await?;
        differs = plan(desired, Some(&existing))?.metadata.is_some();
    }
    Ok(existing)
}
