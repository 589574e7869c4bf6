//! `node …`.

use std::time::SystemTime;

use hv_proto::convert::status_to;
use hv_proto::v1;

use super::{Context, events, follow, operation};
use crate::cli::value::selector_of;
use crate::cli::{
    DrainArgs, GetArgs, NameArgs, NodeCommand, NodeListArgs, NodeNameArgs, NodeNamesArgs, NodeRemoveArgs,
    NodeUpdateArgs,
};
use crate::error::{CtlError, exit_code};
use crate::output::OutputFormat;
use crate::output::text::escape;
use crate::reference;
use crate::server::RequestKeys;
use crate::show::instance::InstanceTable;
use crate::show::node::{NodeTable, describe, status_name};

/// Nodes per page.
const PAGE_SIZE: i32 = 500;
/// Most instances that a description lists.
const DESCRIBED_INSTANCES: i32 = 50;

pub(super) async fn run(context: &Context, command: NodeCommand) -> Result<u8, CtlError> {
    match command {
        NodeCommand::List(args) => list(context, &args).await,
        NodeCommand::Get(args) => get(context, &args).await,
        NodeCommand::Describe(args) => page(context, &args).await,
        NodeCommand::Cordon(args) => cordon(context, &args, true).await,
        NodeCommand::Uncordon(args) => cordon(context, &args, false).await,
        NodeCommand::Drain(args) => drain(context, &args).await,
        NodeCommand::Update(args) => update(context, &args).await,
        NodeCommand::HoldFailover(args) => hold_failover(context, &args, true).await,
        NodeCommand::ReleaseFailover(args) => hold_failover(context, &args, false).await,
        NodeCommand::ConfirmDown(args) => confirm_down(context, &args).await,
        NodeCommand::Remove(args) => remove(context, &args).await,
    }
}

async fn list(context: &Context, args: &NodeListArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let mut request = v1::ListNodesRequest {
        status: args.status.map_or(0, |status| status_to(status) as i32),
        region: args.region.clone().unwrap_or_default(),
        zone: args.zone.clone().unwrap_or_default(),
        label_selector: selector_of(&args.selector),
        page_size: PAGE_SIZE,
        ..Default::default()
    };
    if args.watch {
        return follow::nodes(context, &request).await;
    }
    let mut all = v1::ListNodesResponse::default();
    loop {
        let page = server.call(async || server.cluster().list_nodes(request.clone()).await).await?;
        all.total_count = page.total_count;
        // The oldest page's: a watch from there misses nothing of the later ones.
        all.revision = if all.nodes.is_empty() { page.revision } else { all.revision };
        all.nodes.extend(page.nodes);
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            break;
        }
    }
    match context.output.format {
        OutputFormat::Json | OutputFormat::Yaml => context.output.message("the nodes", &all)?,
        OutputFormat::Table | OutputFormat::Wide if all.nodes.is_empty() => {
            context.note("no nodes found; start hypervisor-agent on one");
        }
        OutputFormat::Table | OutputFormat::Wide | OutputFormat::Name => print(context, all.nodes)?,
    }
    Ok(exit_code::OK)
}

/// Prints nodes that were asked for by name: one as itself, several as a list.
fn print(context: &Context, mut nodes: Vec<v1::Node>) -> Result<(), CtlError> {
    let output = context.output;
    match output.format {
        OutputFormat::Json | OutputFormat::Yaml if nodes.len() == 1 => {
            output.message("the node", &nodes.remove(0))
        }
        OutputFormat::Json | OutputFormat::Yaml => {
            let total_count = i32::try_from(nodes.len()).unwrap_or(i32::MAX);
            output.message("the nodes", &v1::ListNodesResponse { nodes, total_count, ..Default::default() })
        }
        OutputFormat::Name => {
            let lines: String =
                nodes.iter().map(|node| format!("node/{}\n", escape(&node.hostname))).collect();
            output.print(&lines)
        }
        OutputFormat::Table | OutputFormat::Wide => {
            output.print(&NodeTable::new(output).render(&nodes, SystemTime::now()))
        }
    }
}

async fn get(context: &Context, args: &GetArgs) -> Result<u8, CtlError> {
    let mut nodes = Vec::new();
    for name in &args.names {
        nodes.push(reference::node(&context.server, name).await?);
    }
    if args.watch {
        let [node] = &nodes[..] else {
            return Err(CtlError::Usage(
                "--watch takes one name; to watch several use `list --watch`".to_owned(),
            ));
        };
        return follow::node(context, node).await;
    }
    print(context, nodes)?;
    Ok(exit_code::OK)
}

async fn page(context: &Context, args: &NameArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let found = reference::node(server, &args.name).await?;
    // Only this call tells the images.
    let request = v1::GetNodeRequest { node_id: found.id };
    let node = server.call(async || server.cluster().get_node(request.clone()).await).await?;
    if !context.output.format.is_for_people() {
        print(context, vec![node])?;
        return Ok(exit_code::OK);
    }
    let request = v1::ListInstancesRequest {
        node_id: node.id.clone(),
        page_size: DESCRIBED_INSTANCES,
        ..Default::default()
    };
    let instances = server.call(async || server.compute().list_instances(request.clone()).await).await?;
    let mut page = describe(&node, context.output, SystemTime::now());
    if !instances.instances.is_empty() {
        page.heading(0, "Instances");
        let mut table =
            InstanceTable::new(crate::output::Output { format: OutputFormat::Table, ..context.output });
        page.block(1, &table.render(&instances.instances, SystemTime::now()));
        if !instances.next_page_token.is_empty() {
            page.block(1, &format!("… of {}", instances.total_count));
        }
    }
    context.output.print(&page.text())?;
    events::of(context, "node", &node.id).await?;
    Ok(exit_code::OK)
}

/// The nodes of these names: all of them, before anything is asked of the first.
async fn named(context: &Context, names: &[String]) -> Result<Vec<v1::Node>, CtlError> {
    let mut nodes = Vec::new();
    for name in names {
        nodes.push(reference::node(&context.server, name).await?);
    }
    Ok(nodes)
}

async fn cordon(context: &Context, args: &NodeNamesArgs, on: bool) -> Result<u8, CtlError> {
    let server = &context.server;
    let targets = named(context, &args.names).await?;
    let mut keys = RequestKeys::new(&args.key);
    let mut done = Vec::new();
    for target in targets {
        let (node_id, request_key) = (target.id, keys.next());
        let node = if on {
            let request = v1::CordonNodeRequest { node_id, request_key };
            server.call(async || server.cluster().cordon_node(request.clone()).await).await?
        } else {
            let request = v1::UncordonNodeRequest { node_id, request_key };
            server.call(async || server.cluster().uncordon_node(request.clone()).await).await?
        };
        context.output.confirm(format!(
            "node {} is {}",
            escape(&node.hostname),
            status_name(node.status())
        ))?;
        done.push(node);
    }
    if !context.output.format.is_for_people() {
        print(context, done)?;
    }
    Ok(exit_code::OK)
}

/// Asks for the drain, then follows its operation.
async fn drain(context: &Context, args: &DrainArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let target = reference::node(server, &args.name).await?;
    let request = v1::DrainNodeRequest {
        node_id: target.id.clone(),
        discard_local_disks: args.discard_local_disks,
        request_key: RequestKeys::new(&args.key).next(),
        max_parallel: args.max_parallel,
    };
    let mut answer = server.call(async || server.cluster().drain_node(request.clone()).await).await?;
    if args.wait.no_wait || answer.operation_id.is_empty() {
        return drained(context, &answer);
    }
    let request = v1::GetOperationRequest { operation_id: answer.operation_id.clone() };
    let operation = server.call(async || server.operations().get_operation(request.clone()).await).await?;
    let ended = operation::until_final(context, operation, true).await?;
    match ended.state() {
        v1::OperationState::Cancelled => {
            let name = escape(&target.hostname);
            return Err(CtlError::Overtaken(format!("the drain of node {name} was cancelled meanwhile")));
        }
        v1::OperationState::Failed => return Err(CtlError::Precondition(escape(&ended.message))),
        _ => {}
    }
    answer.moving_instance_ids.clear();
    answer.blockers = ended
        .blockers
        .into_iter()
        .map(|b| v1::DrainBlocker { instance_id: b.object_id, name: b.object_name, reason: b.reason })
        .collect();
    drained(context, &answer)
}

async fn update(context: &Context, args: &NodeUpdateArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let replaces_taints = args.no_taints || !args.taint.is_empty();
    if !replaces_taints && args.overcommit.is_none() && args.reserve.is_none() {
        let text = "nothing to change: give --taint, --no-taints, --overcommit or --reserve";
        return Err(CtlError::Usage(text.to_owned()));
    }
    let target = reference::node(server, &args.target.name).await?;
    let request = v1::UpdateNodeRequest {
        node_id: target.id,
        taints: replaces_taints.then(|| v1::TaintList { taints: args.taint.clone() }),
        overcommit: args.overcommit,
        reserved: args.reserve,
        request_key: RequestKeys::new(&args.target.key).next(),
    };
    let node = server.call(async || server.cluster().update_node(request.clone()).await).await?;
    changed(context, vec![node], "is updated")
}

async fn hold_failover(context: &Context, args: &NodeNamesArgs, held: bool) -> Result<u8, CtlError> {
    let server = &context.server;
    let targets = named(context, &args.names).await?;
    let mut keys = RequestKeys::new(&args.key);
    let mut done = Vec::new();
    for target in targets {
        let request = v1::SetNodeFailoverRequest { node_id: target.id, held, request_key: keys.next() };
        done.push(server.call(async || server.cluster().set_node_failover(request.clone()).await).await?);
    }
    changed(context, done, if held { "holds failover" } else { "does not hold failover any more" })
}

async fn confirm_down(context: &Context, args: &NodeNameArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let target = reference::node(server, &args.name).await?;
    let request =
        v1::ConfirmNodeDownRequest { node_id: target.id, request_key: RequestKeys::new(&args.key).next() };
    let node = server.call(async || server.cluster().confirm_node_down(request.clone()).await).await?;
    changed(context, vec![node], "is confirmed to be off; what may run elsewhere is started there")
}

async fn remove(context: &Context, args: &NodeRemoveArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let target = reference::node(server, &args.target.name).await?;
    let request = v1::DeregisterNodeRequest {
        node_id: target.id.clone(),
        request_key: RequestKeys::new(&args.target.key).next(),
        force: args.force,
    };
    server.call(async || server.cluster().deregister_node(request.clone()).await).await?;
    changed(context, vec![target], "is removed")
}

/// Confirms what was done to nodes, or prints them for machines.
fn changed(context: &Context, nodes: Vec<v1::Node>, what: &str) -> Result<u8, CtlError> {
    for node in &nodes {
        context.output.confirm(format!("node {} {what}", escape(&node.hostname)))?;
    }
    if !context.output.format.is_for_people() {
        print(context, nodes)?;
    }
    Ok(exit_code::OK)
}

fn drained(context: &Context, answer: &v1::DrainNodeResponse) -> Result<u8, CtlError> {
    let node = answer.node.clone().unwrap_or_default();
    let name = escape(&node.hostname);
    match context.output.format {
        OutputFormat::Json | OutputFormat::Yaml => context.output.message("the drain", answer)?,
        OutputFormat::Name => context.output.line(format!("node/{name}"))?,
        OutputFormat::Table | OutputFormat::Wide => {
            let moving = answer.moving_instance_ids.len();
            let left =
                if moving == 0 { String::new() } else { format!(", {moving} instances are being moved") };
            context.output.confirm(format!("node {name} is {}{left}", status_name(node.status())))?;
        }
    }
    if answer.blockers.is_empty() {
        return Ok(exit_code::OK);
    }
    let lines: Vec<String> = answer
        .blockers
        .iter()
        .map(|blocker| format!("  {}: {}", escape(&blocker.name), escape(&blocker.reason)))
        .collect();
    let count = lines.len();
    Err(CtlError::Precondition(format!("{count} instances stay on node {name}:\n{}", lines.join("\n"))))
}
