//! What is passed on to the agent of the instance's node: statistics, consoles, commands, logs.

use futures::{Stream, StreamExt, TryStreamExt, stream};
use hv_client::AgentClient;
use hv_proto::v1;
use hv_types::{InstanceId, Invalid, NodeRecord, ServiceError};
use tonic::{Response, Status, Streaming};

use super::request::{failed, id, refuse};
use super::{ReplyStream, Shared};

/// The agent of the node that an instance is bound to.
async fn agent(shared: &Shared, instance: &str) -> Result<AgentClient, Status> {
    let instance: InstanceId = id(instance)?;
    let record = shared.cluster.instance(&instance).await.map_err(failed)?;
    let Some(node) = record.node_id() else {
        let message = format!("instance {} is not on a node: {}", record.name, record.state_reason);
        return Err(refuse(ServiceError::precondition(message)));
    };
    let (node, live) = shared
        .cluster
        .cache()
        .read(|state| state.node(node).map(|entry| (entry.record.clone(), entry.is_live())))
        .ok_or_else(|| failed(hv_cluster::Error::no_node(node)))?;
    let Some(node) = node.filter(|_| live) else {
        let message =
            format!("the node of instance {} does not answer; see `hypervisor-ctl node list`", record.name);
        return Err(refuse(ServiceError::unavailable(message)));
    };
    agent_of(shared, &node)
}

/// The agent of a node.
pub(super) fn agent_of(shared: &Shared, node: &NodeRecord) -> Result<AgentClient, Status> {
    let host = if node.ip.contains(':') { format!("[{}]", node.ip) } else { node.ip.clone() };
    shared.agents.get(&format!("{host}:{}", node.port)).map_err(|error| {
        let message = format!("the address of node {} cannot be used; see the server's log", node.hostname);
        refuse(ServiceError::unavailable(message).caused_by(error))
    })
}

pub(crate) async fn stats(
    shared: &Shared,
    request: v1::GetInstanceStatsRequest,
) -> Result<Response<v1::InstanceStats>, Status> {
    let mut agent = agent(shared, &request.instance_id).await?;
    agent.get_instance_stats(v1::AgentInstanceRequest { instance_id: request.instance_id }).await
}

pub(crate) async fn logs(
    shared: &Shared,
    request: v1::GetInstanceLogsRequest,
) -> Result<Response<ReplyStream<v1::LogChunk>>, Status> {
    let mut agent = agent(shared, &request.instance_id).await?;
    let output = agent.get_instance_logs(request).await?.into_inner();
    Ok(shared.until_stop(output))
}

/// The first message of a stream of input.
async fn first<T>(input: &mut Streaming<T>, expected: &str) -> Result<T, Status> {
    input.message().await?.ok_or_else(|| refuse(Invalid::new("input", "an empty stream", expected)))
}

/// Input from the user for as long as it comes without a fault; a user who goes away ends the agent's stream too.
fn passed_on<T: Send + 'static, U>(
    input: Streaming<T>,
    translate: impl Fn(T) -> Option<U> + Send + 'static,
) -> impl Stream<Item = U> + Send + 'static
where
    U: Send + 'static,
{
    input.take_while(|message| std::future::ready(message.is_ok())).filter_map(move |message| {
        let translated = message.ok().and_then(&translate);
        std::future::ready(translated)
    })
}

fn console_data(output: Streaming<v1::AgentConsoleOutput>) -> ReplyStream<v1::ConsoleData> {
    Box::pin(output.map_ok(|output| v1::ConsoleData { data: output.data }))
}

fn to_agent(input: v1::console_input::Input) -> v1::AgentConsoleInput {
    use v1::agent_console_input::Input as ForAgent;
    use v1::console_input::Input;
    let input = match input {
        Input::Attach(attach) => ForAgent::Attach(attach),
        Input::Data(data) => ForAgent::Data(data),
        Input::Resize(size) => {
            ForAgent::Resize(v1::AgentConsoleResize { width: size.width, height: size.height })
        }
    };
    v1::AgentConsoleInput { input: Some(input) }
}

pub(crate) async fn attach_console(
    shared: &Shared,
    request: v1::AttachConsoleRequest,
) -> Result<Response<ReplyStream<v1::ConsoleData>>, Status> {
    let mut agent = agent(shared, &request.instance_id).await?;
    let sized = request.width > 0 && request.height > 0;
    let size = sized.then_some(v1::TerminalSize { width: request.width, height: request.height });
    let attach = v1::ConsoleAttach { instance_id: request.instance_id, size };
    // The input stays open and silent: its end would end the console.
    let input = stream::iter([to_agent(v1::console_input::Input::Attach(attach))]).chain(stream::pending());
    let output = agent.attach_console(input).await?.into_inner();
    Ok(shared.until_stop(console_data(output)))
}

pub(crate) async fn console(
    shared: &Shared,
    mut input: Streaming<v1::ConsoleInput>,
) -> Result<Response<ReplyStream<v1::ConsoleData>>, Status> {
    let expected = "must begin with `attach`, which names the instance";
    let Some(v1::console_input::Input::Attach(attach)) = first(&mut input, expected).await?.input else {
        return Err(refuse(Invalid::new("input", "another message", expected)));
    };
    let mut agent = agent(shared, &attach.instance_id).await?;
    let begin = stream::iter([to_agent(v1::console_input::Input::Attach(attach))]);
    let rest = passed_on(input, |message: v1::ConsoleInput| message.input.map(to_agent));
    let output = agent.attach_console(begin.chain(rest)).await?.into_inner();
    Ok(shared.until_stop(console_data(output)))
}

pub(crate) async fn exec(
    shared: &Shared,
    mut input: Streaming<v1::ExecInput>,
) -> Result<Response<ReplyStream<v1::ExecOutput>>, Status> {
    let expected = "must begin with `start`, which names the instance and the command";
    let begin = first(&mut input, expected).await?;
    let Some(v1::exec_input::Input::Start(start)) = &begin.input else {
        return Err(refuse(Invalid::new("input", "another message", expected)));
    };
    let mut agent = agent(shared, &start.instance_id).await?;
    let output = agent.exec(stream::iter([begin]).chain(passed_on(input, Some))).await?.into_inner();
    Ok(shared.until_stop(output))
}
