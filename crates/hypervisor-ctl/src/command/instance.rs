//! `instance …`: what reads. What changes is in `change` and `create`.

use std::time::SystemTime;

use hv_proto::convert::{instance_type_to, state_to};
use hv_proto::v1;
use hv_types::InstanceType;

use super::{
    Context, change, clone, console, create, events, exec, follow, migrate, placement, snapshot, stats,
    update,
};
use crate::cli::value::selector_of;
use crate::cli::{GetArgs, InstanceCommand, ListArgs, NameArgs};
use crate::error::{CtlError, exit_code};
use crate::output::OutputFormat;
use crate::output::text::escape;
use crate::reference::{self, noun};
use crate::show::instance::{InstanceTable, describe};

/// Instances per page.
const PAGE_SIZE: i32 = 500;

/// Runs a command on instances, of this type only where the noun says so.
pub(super) async fn run(
    context: &Context,
    only: Option<InstanceType>,
    command: InstanceCommand,
) -> Result<u8, CtlError> {
    match command {
        InstanceCommand::List(args) => list(context, only, &args).await,
        InstanceCommand::Get(args) => get(context, only, &args).await,
        InstanceCommand::Describe(args) => page(context, only, &args).await,
        InstanceCommand::Explain(args) => placement::explain(context, only, &args).await,
        InstanceCommand::Create(args) => create::run(context, only, &args).await,
        InstanceCommand::Start(args) => change::run(context, only, &args, change::Verb::Start).await,
        InstanceCommand::Stop(args) => {
            let seconds =
                args.grace.map_or(0, |grace| i32::try_from(grace.get().as_secs()).unwrap_or(i32::MAX));
            let verb = change::Verb::Stop { force: args.force, timeout_seconds: seconds };
            change::run(context, only, &args.target, verb).await
        }
        InstanceCommand::Restart(args) => {
            change::run(context, only, &args.target, change::Verb::Restart { force: args.force }).await
        }
        InstanceCommand::Pause(args) => change::run(context, only, &args, change::Verb::Pause).await,
        InstanceCommand::Resume(args) => change::run(context, only, &args, change::Verb::Resume).await,
        InstanceCommand::Delete(args) => {
            let verb = change::Verb::Delete { force: args.force, ignore_not_found: args.ignore_not_found };
            change::run(context, only, &args.target, verb).await
        }
        InstanceCommand::Update(args) => update::run(context, only, &args).await,
        InstanceCommand::Rename(args) => update::rename(context, only, &args).await,
        InstanceCommand::Rescue(args) => update::rescue(context, only, &args).await,
        InstanceCommand::Unrescue(args) => update::unrescue(context, only, &args).await,
        InstanceCommand::Snapshot(command) => snapshot::run(context, only, command).await,
        InstanceCommand::Clone(args) => clone::run(context, only, &args).await,
        InstanceCommand::Migrate(args) => migrate::run(context, only, &args).await,
        InstanceCommand::Console(args) => console::run(context, only, &args).await,
        InstanceCommand::Exec(args) => exec::run(context, only, &args).await,
        InstanceCommand::Logs(args) => stats::logs(context, only, &args).await,
        InstanceCommand::Stats(args) => stats::run(context, only, &args).await,
    }
}

/// The type that the noun and `--type` agree on.
pub(super) fn agreed_type(
    only: Option<InstanceType>,
    flag: Option<InstanceType>,
) -> Result<Option<InstanceType>, CtlError> {
    match (only, flag) {
        (Some(only), Some(flag)) if only != flag => Err(CtlError::Usage(format!(
            "`{only}` and --type {flag} contradict each other; leave one of them out"
        ))),
        _ => Ok(only.or(flag)),
    }
}

async fn list(context: &Context, only: Option<InstanceType>, args: &ListArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let kind = agreed_type(only, args.r#type)?;
    let node_id = match &args.node {
        Some(name) => reference::node(server, name).await?.id,
        None => String::new(),
    };
    let mut request = v1::ListInstancesRequest {
        r#type: kind.map_or(0, |kind| instance_type_to(kind) as i32),
        state: args.state.map_or(0, |state| state_to(state) as i32),
        node_id,
        label_selector: selector_of(&args.selector),
        page_size: PAGE_SIZE,
        project: args.project.clone().unwrap_or_default(),
        ..Default::default()
    };
    if args.watch {
        return follow::instances(context, noun(kind), &request).await;
    }

    let mut table = InstanceTable::new(context.output);
    let mut all = v1::ListInstancesResponse::default();
    let mut count = 0;
    loop {
        let page = server.call(async || server.compute().list_instances(request.clone()).await).await?;
        count += page.instances.len();
        request.page_token = page.next_page_token;
        match context.output.format {
            OutputFormat::Json | OutputFormat::Yaml => {
                all.total_count = page.total_count;
                // The oldest page's: a watch from there misses nothing of the later ones.
                all.revision = if all.instances.is_empty() { page.revision } else { all.revision };
                all.instances.extend(page.instances);
            }
            OutputFormat::Name => names(context, noun(kind), &page.instances)?,
            OutputFormat::Table | OutputFormat::Wide if page.instances.is_empty() => {}
            OutputFormat::Table | OutputFormat::Wide => {
                context.output.print(&table.render(&page.instances, SystemTime::now()))?;
            }
        }
        if request.page_token.is_empty() {
            break;
        }
    }
    match context.output.format {
        OutputFormat::Json | OutputFormat::Yaml => context.output.message("the instances", &all)?,
        OutputFormat::Table | OutputFormat::Wide if count == 0 => {
            context.note(&format!("no {}s found", noun(kind)));
        }
        OutputFormat::Table | OutputFormat::Wide | OutputFormat::Name => {}
    }
    Ok(exit_code::OK)
}

async fn get(context: &Context, only: Option<InstanceType>, args: &GetArgs) -> Result<u8, CtlError> {
    let mut instances = Vec::new();
    for name in &args.names {
        instances.push(reference::instance(&context.server, only, name).await?);
    }
    if args.watch {
        let [instance] = &instances[..] else {
            return Err(CtlError::Usage(
                "--watch takes one name; to watch several use `list --watch`".to_owned(),
            ));
        };
        return follow::instance(context, noun(only), instance).await;
    }
    print(context, noun(only), instances)?;
    Ok(exit_code::OK)
}

/// Prints instances that were asked for by name: one as itself, several as a list.
pub(super) fn print(context: &Context, noun: &str, mut instances: Vec<v1::Instance>) -> Result<(), CtlError> {
    let output = context.output;
    match output.format {
        OutputFormat::Json | OutputFormat::Yaml if instances.len() == 1 => {
            output.message("the instance", &instances.remove(0))
        }
        OutputFormat::Json | OutputFormat::Yaml => {
            let total_count = i32::try_from(instances.len()).unwrap_or(i32::MAX);
            output.message(
                "the instances",
                &v1::ListInstancesResponse { instances, total_count, ..Default::default() },
            )
        }
        OutputFormat::Name => names(context, noun, &instances),
        OutputFormat::Table | OutputFormat::Wide => {
            output.print(&InstanceTable::new(output).render(&instances, SystemTime::now()))
        }
    }
}

fn names(context: &Context, noun: &str, instances: &[v1::Instance]) -> Result<(), CtlError> {
    let lines: String =
        instances.iter().map(|instance| format!("{noun}/{}\n", escape(&instance.name))).collect();
    context.output.print(&lines)
}

async fn page(context: &Context, only: Option<InstanceType>, args: &NameArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let instance = reference::instance(server, only, &args.name).await?;
    if !context.output.format.is_for_people() {
        print(context, noun(only), vec![instance])?;
        return Ok(exit_code::OK);
    }
    // The page is worth printing without the node's name and without the events.
    let node_name = if instance.node_id.is_empty() {
        String::new()
    } else {
        let request = v1::GetNodeRequest { node_id: instance.node_id.clone() };
        let node = server.call(async || server.cluster().get_node(request.clone()).await).await;
        node.map(|node| node.hostname).unwrap_or_default()
    };
    let page = describe(&instance, &node_name, context.output);
    context.output.print(&page.text())?;
    events::of(context, "instance", &instance.id).await?;
    Ok(exit_code::OK)
}
