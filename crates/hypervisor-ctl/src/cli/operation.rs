//! `operation …`.

use clap::{Args, Subcommand};

use super::RequestKeyArgs;

/// What can be done with operations.
#[derive(Debug, Subcommand)]
pub enum OperationCommand {
    /// List operations, newest first
    #[command(visible_alias = "ls")]
    List(OperationListArgs),
    /// Print one operation
    #[command(after_long_help = "Examples:\n  hypervisor-ctl operation get 0190a1b2 -o yaml")]
    Get(OperationArgs),
    /// Follow an operation until it ends; the exit code is 0 if it succeeded
    #[command(after_long_help = "Examples:\n  hypervisor-ctl operation watch 0190a1b2 --timeout 1h")]
    Watch(OperationArgs),
    /// Give an operation up; what its kind can undo is undone
    #[command(after_long_help = "Examples:\n  hypervisor-ctl operation cancel 0190a1b2")]
    Cancel(OperationCancelArgs),
}

/// `operation list`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  hypervisor-ctl operation list
  hypervisor-ctl operation list --active --for node/node-1")]
pub struct OperationListArgs {
    /// Only those that have not ended
    #[arg(long)]
    pub active: bool,
    /// Only about this object: instance/NAME or node/NAME
    #[arg(long = "for", value_name = "KIND/NAME", value_parser = super::value::event_object)]
    pub object: Option<super::value::EventObject>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub tail: u32,
}

/// One operation.
#[derive(Debug, Args)]
pub struct OperationArgs {
    /// Its id, or the beginning of it
    #[arg(value_name = "ID")]
    pub id: String,
}

/// `operation cancel`.
#[derive(Debug, Args)]
pub struct OperationCancelArgs {
    /// Which one.
    #[command(flatten)]
    pub target: OperationArgs,
    /// The request's identity.
    #[command(flatten)]
    pub key: RequestKeyArgs,
}
