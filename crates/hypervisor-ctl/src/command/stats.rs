//! `instance stats` and `instance logs`.

use std::time::SystemTime;

use hv_proto::convert::to_timestamp;
use hv_proto::v1;
use hv_types::InstanceType;

use super::Context;
use crate::cli::{LogsArgs, StatsArgs};
use crate::error::{CtlError, exit_code};
use crate::output::text::escape;
use crate::output::{OutputFormat, write_stdout};
use crate::reference;
use crate::show::instance::{stats_row, stats_table};

pub(super) async fn run(
    context: &Context,
    only: Option<InstanceType>,
    args: &StatsArgs,
) -> Result<u8, CtlError> {
    let server = &context.server;
    let mut targets = Vec::new();
    for name in &args.names {
        targets.push(reference::instance(server, only, name).await?);
    }
    let mut table = stats_table(context.output);
    loop {
        let mut rows = Vec::new();
        for target in &targets {
            let request = v1::GetInstanceStatsRequest { instance_id: target.id.clone() };
            let stats =
                server.call(async || server.compute().get_instance_stats(request.clone()).await).await?;
            match context.output.format {
                OutputFormat::Json | OutputFormat::Yaml if args.watch || targets.len() > 1 => {
                    context.output.event("the statistics", &stats)?;
                }
                OutputFormat::Json | OutputFormat::Yaml => {
                    context.output.message("the statistics", &stats)?;
                }
                OutputFormat::Name => context.output.line(format!("instance/{}", escape(&target.name)))?,
                OutputFormat::Table | OutputFormat::Wide => {
                    rows.push(stats_row(context.output, &target.name, &stats));
                }
            }
        }
        if !rows.is_empty() {
            context.output.print(&table.render(&rows))?;
        }
        if !args.watch {
            return Ok(exit_code::OK);
        }
        tokio::time::sleep(args.interval.get()).await;
    }
}

/// Prints bytes as the instance printed them.
pub(super) async fn logs(
    context: &Context,
    only: Option<InstanceType>,
    args: &LogsArgs,
) -> Result<u8, CtlError> {
    let server = &context.server;
    let target = reference::instance(server, only, &args.name).await?;
    let request = v1::GetInstanceLogsRequest {
        instance_id: target.id,
        tail_lines: args.tail.unwrap_or_default(),
        follow: args.follow,
        since: args.since.map(|ago| to_timestamp(SystemTime::now() - ago.get())),
    };
    let mut chunks = server.call(async || server.compute().get_instance_logs(request.clone()).await).await?;
    while let Some(chunk) = chunks.message().await.map_err(|status| server.error(&status))? {
        write_stdout(&chunk.data)?;
    }
    Ok(exit_code::OK)
}
