//! `instance create`.

use std::io::Read;
use std::path::Path;

use hv_config::HumanDuration;
use hv_proto::convert::{failover_policy_to, instance_type_to, restart_policy_to};
use hv_proto::v1;
use hv_types::InstanceType;
use hv_types::instance::spec::MAX_USER_DATA_BYTES;
use tokio::time::Instant;

use super::instance::{agreed_type, print};
use super::{Context, change};
use crate::cli::value::{map_of, selector_of};
use crate::cli::{CreateArgs, KindArgs, PlacementArgs, ShapeArgs};
use crate::error::{CtlError, exit_code};
use crate::output::text::escape;
use crate::reference::{self, noun};
use crate::server::{RequestKeys, Server};
use crate::show::instance::state_name;
use crate::wait::{Goal, Wait, deadline};

pub(super) async fn run(
    context: &Context,
    only: Option<InstanceType>,
    args: &CreateArgs,
) -> Result<u8, CtlError> {
    let request = request(&context.server, only, args).await?;
    let began = Instant::now();
    let created = match args.count {
        Some(count) => create_set(context, request, count).await?,
        None => vec![create(context, &request).await?],
    };
    follow(context, only, created, args.wait.no_wait, began).await
}

/// Waits until instances run, unless told not to, and tells of each.
pub(super) async fn follow(
    context: &Context,
    only: Option<InstanceType>,
    created: Vec<v1::Instance>,
    no_wait: bool,
    began: Instant,
) -> Result<u8, CtlError> {
    let mut done = Vec::with_capacity(created.len());
    let end = deadline(context.server.timeout);
    for instance in created {
        done.push(if no_wait {
            let (name, id) = (escape(&instance.name), escape(&instance.id));
            let state = state_name(instance.state());
            context.output.confirm(format!("instance {name} is {state} (id {id})"))?;
            instance
        } else {
            until_running(context, instance, began, end).await?
        });
    }
    if !context.output.format.is_for_people() {
        print(context, noun(only), done)?;
    }
    Ok(exit_code::OK)
}

async fn until_running(
    context: &Context,
    created: v1::Instance,
    began: Instant,
    end: Instant,
) -> Result<v1::Instance, CtlError> {
    let mut progress = context.progress();
    let wait = Wait {
        server: &context.server,
        progress: &mut progress,
        goal: Goal::Running,
        generation: created.generation,
        instance: created,
    };
    let settled = Box::pin(wait.until(end)).await?;
    context.output.confirm(change::confirmation(&settled, Goal::Running, began.elapsed()))?;
    Ok(settled)
}

/// Asks for a set, and reads what came of it.
async fn create_set(
    context: &Context,
    template: v1::CreateInstanceRequest,
    count: u32,
) -> Result<Vec<v1::Instance>, CtlError> {
    let server = &context.server;
    let request = v1::CreateInstancesRequest { template: Some(template), count };
    let answer = server.call(async || server.compute().create_instances(request.clone()).await).await?;
    read(server, answer.instances).await
}

/// Reads instances that were created.
pub(super) async fn read(
    server: &Server,
    created: Vec<v1::CreatedInstance>,
) -> Result<Vec<v1::Instance>, CtlError> {
    let mut instances = Vec::with_capacity(created.len());
    for created in created {
        let request = v1::GetInstanceRequest { instance_id: created.id };
        instances.push(server.call(async || server.compute().get_instance(request.clone()).await).await?);
    }
    Ok(instances)
}

/// Sends a create request; it must have a request key.
pub(crate) async fn create(
    context: &Context,
    request: &v1::CreateInstanceRequest,
) -> Result<v1::Instance, CtlError> {
    let server = &context.server;
    server.call(async || server.compute().create_instance(request.clone()).await).await
}

async fn request(
    server: &Server,
    only: Option<InstanceType>,
    args: &CreateArgs,
) -> Result<v1::CreateInstanceRequest, CtlError> {
    let user_data = args.user_data.as_deref().map(user_data).transpose()?.unwrap_or_default();
    let mut request = template(server, only, &args.shape).await?;
    request.name = args.name.clone().or_else(|| args.name_flag.clone()).unwrap_or_default();
    request.request_key = RequestKeys::new(&args.key).next();
    if let Some(spec) = &mut request.spec {
        spec.command.clone_from(&args.command);
        spec.user_data = user_data;
    }
    Ok(request)
}

/// What the flags describe, without a name.
pub(super) async fn template(
    server: &Server,
    only: Option<InstanceType>,
    shape: &ShapeArgs,
) -> Result<v1::CreateInstanceRequest, CtlError> {
    let Some(kind) = agreed_type(only, shape.r#type)? else {
        return Err(CtlError::Usage(
            "which type? add --type vm, --type container or --type microvm, or use `vm create`".to_owned(),
        ));
    };
    let placement = &shape.placement;
    let preferred_node_id = match &placement.node {
        Some(name) => reference::node(server, name).await?.id,
        None => String::new(),
    };
    Ok(v1::CreateInstanceRequest {
        r#type: instance_type_to(kind) as i32,
        spec: Some(v1::InstanceSpec {
            image: shape.image.clone().unwrap_or_default(),
            cpu_cores: shape.cpus,
            memory_bytes: i64::try_from(shape.memory.bytes()).unwrap_or(i64::MAX),
            disks: shape.disk.clone(),
            kernel: shape.kernel.clone().unwrap_or_default(),
            initrd: shape.initrd.clone().unwrap_or_default(),
            kernel_args: shape.kernel_args.clone().unwrap_or_default(),
            env: map_of(&shape.env),
            ..of_kind(&shape.kind)
        }),
        metadata: Some(v1::Metadata { labels: map_of(&shape.label), annotations: map_of(&shape.annotation) }),
        preferred_node_id,
        region: placement.region.clone().unwrap_or_default(),
        zone: placement.zone.clone().unwrap_or_default(),
        node_selector: selector_of(&placement.node_selector),
        project: shape.project.clone().unwrap_or_default(),
        restart_policy: restart_policy_to(placement.restart).into(),
        failover_policy: failover_policy_to(placement.failover).into(),
        placement: rules(placement),
        ..Default::default()
    })
}

/// What only instances of some types have; the server refuses it for others.
fn of_kind(kind: &KindArgs) -> v1::InstanceSpec {
    let seconds = |time: Option<HumanDuration>| {
        time.map_or(0, |time| u32::try_from(time.get().as_secs().max(1)).unwrap_or(u32::MAX))
    };
    let health_check = kind.health_cmd.as_ref().map(|command| v1::HealthCheck {
        command: command.split_whitespace().map(str::to_owned).collect(),
        interval_seconds: seconds(kind.health_interval),
        timeout_seconds: seconds(kind.health_timeout),
        retries: kind.health_retries.unwrap_or_default(),
        start_seconds: seconds(kind.health_start),
    });
    v1::InstanceSpec {
        firmware: kind.firmware.clone().unwrap_or_default(),
        tpm: kind.tpm,
        user: kind.user.clone().unwrap_or_default(),
        working_dir: kind.working_dir.clone().unwrap_or_default(),
        read_only_root: kind.read_only,
        limits: kind.pids_limit.map(|pids| v1::ResourceLimits { pids, ..Default::default() }),
        health_check,
        devices: devices(kind),
        ..Default::default()
    }
}

/// What it is to have for itself; absent where it is nothing.
fn devices(kind: &KindArgs) -> Option<v1::DeviceNeeds> {
    let needs = v1::DeviceNeeds {
        dedicated_cpus: kind.dedicated_cpus,
        huge_page_bytes: kind.hugepages.map_or(0, |size| size.bytes()),
        pci: kind.device.clone(),
    };
    (needs != v1::DeviceNeeds::default()).then_some(needs)
}

/// The rules beyond node, region, zone and labels; absent where there are none.
fn rules(placement: &PlacementArgs) -> Option<v1::PlacementRules> {
    let rules = v1::PlacementRules {
        affinity: placement.near.iter().chain(&placement.away).cloned().collect(),
        spread: placement.spread.clone(),
        tolerations: placement.toleration.clone(),
        priority: placement.priority,
    };
    (rules != v1::PlacementRules::default()).then_some(rules)
}

fn user_data(path: &Path) -> Result<String, CtlError> {
    let failed = |source| CtlError::File { action: "read the user data", path: path.to_owned(), source };
    let limit = MAX_USER_DATA_BYTES as u64 + 1;
    let mut text = String::new();
    if path == Path::new("-") {
        std::io::stdin().take(limit).read_to_string(&mut text).map_err(failed)?;
    } else {
        std::fs::File::open(path).map_err(failed)?.take(limit).read_to_string(&mut text).map_err(failed)?;
    }
    if text.len() > MAX_USER_DATA_BYTES {
        let limit = MAX_USER_DATA_BYTES >> 10;
        return Err(CtlError::Usage(format!("{}: user data must have at most {limit} KiB", path.display())));
    }
    Ok(text)
}
