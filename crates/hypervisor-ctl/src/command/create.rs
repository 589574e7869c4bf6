//! `instance create`.

use std::io::Read;
use std::path::Path;

use hv_proto::convert::instance_type_to;
use hv_proto::v1;
use hv_types::InstanceType;
use hv_types::instance::spec::MAX_USER_DATA_BYTES;
use tokio::time::Instant;

use super::instance::{agreed_type, print};
use super::{Context, change};
use crate::cli::CreateArgs;
use crate::cli::value::{map_of, selector_of};
use crate::error::{CtlError, exit_code};
use crate::output::text::escape;
use crate::reference::{self, noun};
use crate::server::RequestKeys;
use crate::show::instance::state_name;
use crate::wait::{Goal, Wait, deadline};

pub(super) async fn run(
    context: &Context,
    only: Option<InstanceType>,
    args: &CreateArgs,
) -> Result<u8, CtlError> {
    let server = &context.server;
    let mut request = request(only, args)?;
    if let Some(name) = &args.node {
        request.preferred_node_id = reference::node(server, name).await?.id;
    }
    let began = Instant::now();
    let created = create(context, &request).await?;
    let created = if args.wait.no_wait {
        let (name, id) = (escape(&created.name), escape(&created.id));
        context.output.confirm(format!("instance {name} is {} (id {id})", state_name(created.state())))?;
        created
    } else {
        let mut progress = context.progress();
        let wait = Wait {
            server,
            progress: &mut progress,
            goal: Goal::Running,
            generation: created.generation,
            instance: created,
        };
        let settled = Box::pin(wait.until(deadline(server.timeout))).await?;
        context.output.confirm(change::confirmation(&settled, Goal::Running, began.elapsed()))?;
        settled
    };
    if !context.output.format.is_for_people() {
        print(context, noun(only), vec![created])?;
    }
    Ok(exit_code::OK)
}

/// Sends a create request; it must have a request key.
pub(crate) async fn create(
    context: &Context,
    request: &v1::CreateInstanceRequest,
) -> Result<v1::Instance, CtlError> {
    let server = &context.server;
    server.call(async || server.compute().create_instance(request.clone()).await).await
}

fn request(only: Option<InstanceType>, args: &CreateArgs) -> Result<v1::CreateInstanceRequest, CtlError> {
    let Some(kind) = agreed_type(only, args.r#type)? else {
        return Err(CtlError::Usage(
            "which type? add --type vm, --type container or --type microvm, or use `vm create`".to_owned(),
        ));
    };
    let name = args.name.clone().or_else(|| args.name_flag.clone()).unwrap_or_default();
    let user_data = args.user_data.as_deref().map(user_data).transpose()?.unwrap_or_default();
    Ok(v1::CreateInstanceRequest {
        name,
        r#type: instance_type_to(kind) as i32,
        spec: Some(v1::InstanceSpec {
            image: args.image.clone().unwrap_or_default(),
            cpu_cores: args.cpus,
            memory_bytes: i64::try_from(args.memory.bytes()).unwrap_or(i64::MAX),
            disks: args.disk.clone(),
            kernel: args.kernel.clone().unwrap_or_default(),
            initrd: args.initrd.clone().unwrap_or_default(),
            kernel_args: args.kernel_args.clone().unwrap_or_default(),
            command: args.command.clone(),
            env: map_of(&args.env),
            user_data,
            ..Default::default()
        }),
        metadata: Some(v1::Metadata { labels: map_of(&args.label), annotations: map_of(&args.annotation) }),
        region: args.region.clone().unwrap_or_default(),
        zone: args.zone.clone().unwrap_or_default(),
        request_key: RequestKeys::new(&args.key).next(),
        node_selector: selector_of(&args.node_selector),
        project: args.project.clone().unwrap_or_default(),
        ..Default::default()
    })
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
