//! The commands. Each returns what the process exits with.

mod apply;
mod change;
mod clone;
mod cluster;
mod console;
mod create;
pub(crate) mod document;
mod events;
mod exec;
mod follow;
mod image;
mod instance;
mod migrate;
mod node;
mod operation;
mod placement;
mod snapshot;
mod stats;
mod stdin;
mod store;
mod update;
pub(crate) mod version;

pub(crate) use change::Verb;

use hv_types::InstanceType;

use crate::cli::{ClusterCommand, Command, ConfigCommand};
use crate::error::{CtlError, exit_code};
use crate::output::Output;
use crate::progress::Progress;
use crate::server::Server;

/// What every command that talks to the server has.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) server: Server,
    pub(crate) output: Output,
}

impl Context {
    pub(crate) fn progress(&self) -> Progress {
        Progress::new(!self.output.quiet)
    }

    /// Says something that is neither a result nor an error.
    pub(crate) fn note(&self, text: &str) {
        Progress::new(!self.output.quiet).note(text);
    }
}

/// Runs a command that talks to the server.
pub(crate) async fn run(context: &Context, command: Command) -> Result<u8, CtlError> {
    match command {
        Command::Instance(command) => instance::run(context, None, command).await,
        Command::Vm(command) => instance::run(context, Some(InstanceType::Vm), command).await,
        Command::Container(command) => instance::run(context, Some(InstanceType::Container), command).await,
        Command::Microvm(command) => instance::run(context, Some(InstanceType::Microvm), command).await,
        Command::Node(command) => node::run(context, command).await,
        Command::Image(command) => image::run(context, command).await,
        Command::Cluster(ClusterCommand::Info) => cluster::info(context).await,
        Command::Schedule(args) => placement::schedule(context, &args).await,
        Command::Operation(command) => operation::run(context, command).await,
        Command::Store(command) => store::run(context, command).await,
        Command::Events(args) => events::run(context, &args).await,
        Command::Apply(args) => Box::pin(apply::run(context, &args)).await,
        Command::Version(_) => version::with_server(context).await,
        // These were run without a server.
        Command::Config(ConfigCommand::Show)
        | Command::Completion(_)
        | Command::Man(_)
        | Command::DocsMarkdown => Ok(exit_code::OK),
    }
}
