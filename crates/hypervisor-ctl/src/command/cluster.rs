//! `cluster info`.

use hv_proto::v1;

use super::Context;
use crate::error::{CtlError, exit_code};
use crate::output::OutputFormat;
use crate::output::text::escape;
use crate::show::{Page, resources};

pub(super) async fn info(context: &Context) -> Result<u8, CtlError> {
    let server = &context.server;
    let info = server.call(async || server.cluster().get_cluster_info(pbjson_types::Empty {}).await).await?;
    match context.output.format {
        OutputFormat::Json | OutputFormat::Yaml => context.output.message("the cluster", &info)?,
        OutputFormat::Name => context.output.line(format!("cluster/{}", escape(&info.cluster_name)))?,
        OutputFormat::Table | OutputFormat::Wide => context.output.print(&page(&info).text())?,
    }
    Ok(exit_code::OK)
}

fn page(info: &v1::ClusterInfo) -> Page {
    let mut page = Page::default();
    page.line(0, "Name", escape(&info.cluster_name));
    page.line(0, "Id", escape(&info.cluster_id));
    page.line(0, "Server version", escape(&info.version));
    page.line(0, "Nodes", format!("{} of {} ready", info.ready_nodes, info.total_nodes));
    page.line(
        0,
        "Instances",
        format!(
            "{} ({} running, {} waiting for a node)",
            info.total_instances, info.running_instances, info.pending_instances
        ),
    );
    page.line(0, "Capacity", resources(info.total_capacity.as_ref()));
    page.line(0, "Allocated", resources(info.total_allocated.as_ref()));
    page.line(0, "Store", escape(&info.store_backend));
    let leader = if info.leader.is_empty() { "none" } else { &info.leader };
    page.line(0, "Leader", escape(leader));
    page.line(0, "Revision", info.revision.to_string());
    page
}
