//! `version`: without the server it must not start a runtime, read a file or open a connection.

use serde::Serialize;

use super::Context;
use crate::error::{CtlError, exit_code};
use crate::output::Output;

#[derive(Debug, Serialize)]
struct Versions {
    client: Version,
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<Version>,
}

#[derive(Debug, Serialize)]
struct Version {
    version: String,
}

fn client() -> Version {
    Version { version: env!("CARGO_PKG_VERSION").to_owned() }
}

/// The version of this program.
pub(crate) fn client_only(output: Output) -> Result<u8, CtlError> {
    print(output, &Versions { client: client(), server: None })
}

/// The same, and the server's.
pub(crate) async fn with_server(context: &Context) -> Result<u8, CtlError> {
    let info =
        context.server.call(async || context.server.cluster().get_cluster_info(pbjson_types::Empty {}).await);
    let server = info.await.map(|info| Version { version: info.version });
    let (server, failed) = match server {
        Ok(version) => (Some(version), None),
        Err(error) => (None, Some(error)),
    };
    print(context.output, &Versions { client: client(), server })?;
    failed.map_or(Ok(exit_code::OK), Err)
}

fn print(output: Output, versions: &Versions) -> Result<u8, CtlError> {
    if output.format.is_for_people() || output.format == crate::output::OutputFormat::Name {
        let server = versions
            .server
            .as_ref()
            .map(|server| format!("hypervisor-server {}\n", crate::output::text::escape(&server.version)));
        output.print(&format!(
            "hypervisor-ctl {}\n{}",
            versions.client.version,
            server.unwrap_or_default()
        ))?;
    } else {
        output.message("the versions", versions)?;
    }
    Ok(exit_code::OK)
}
