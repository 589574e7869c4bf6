//! The settings of the command line: flag over environment over file over default.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use hv_client::{ClientOptions, ClientTls};
use hv_config::{ConfigError, HumanDuration, Loaded, Sources};
use serde::{Deserialize, Serialize};

use crate::cli::GlobalArgs;
use crate::output::OutputFormat;

/// Only these variables are ours; the others with the prefix belong to the server and the agent.
const PREFIX: &str = "HYPERVISOR_CTL_";
/// Names the settings file, where the flag does not.
const FILE_VARIABLE: &str = "HYPERVISOR_CTL_CONFIG";
/// Short for [`SERVER_VARIABLE`], which wins.
const SHORT_SERVER_VARIABLE: &str = "HYPERVISOR_SERVER";
const SERVER_VARIABLE: &str = "HYPERVISOR_CTL_SERVER";

/// Everything that can be set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// All of it.
    pub ctl: CtlSettings,
}

/// What can be set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CtlSettings {
    /// Where the server is: `host:port`, `:port`, `http://…`, `https://…`.
    pub server: String,
    /// How results are printed.
    pub output: OutputFormat,
    /// How long a command waits for what it asked for.
    pub timeout: HumanDuration,
    /// Certificates; without `ca_file` the connection is plain text.
    pub tls: TlsSettings,
}

/// Certificates.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsSettings {
    /// PEM file of the authority that signed the server's certificate.
    pub ca_file: Option<PathBuf>,
    /// PEM file of the own certificate.
    pub cert_file: Option<PathBuf>,
    /// PEM file of its key.
    pub key_file: Option<PathBuf>,
    /// The name in the server's certificate, where it is not the address's host.
    pub server_name: Option<String>,
}

impl Default for CtlSettings {
    fn default() -> Self {
        Self {
            server: "127.0.0.1:50051".to_owned(),
            output: OutputFormat::Table,
            timeout: HumanDuration::from_secs(300),
            tls: TlsSettings::default(),
        }
    }
}

impl Settings {
    /// Reads all sources.
    ///
    /// # Errors
    /// The first mistake found, with its place.
    pub fn load(
        global: &GlobalArgs,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Loaded<Self>, ConfigError> {
        let environment: Vec<(OsString, OsString)> = environment.into_iter().collect();
        let variable = |name: &str| {
            let found = environment.iter().find(|(known, _)| known == name);
            found.map(|(_, value)| value.clone()).filter(|value| !value.is_empty())
        };
        let mut ours: Vec<(OsString, OsString)> =
            environment.iter().filter(|(name, _)| is_ours(name)).cloned().collect();
        if variable(SERVER_VARIABLE).is_none()
            && let Some(server) = variable(SHORT_SERVER_VARIABLE)
        {
            ours.push((SERVER_VARIABLE.into(), server));
        }

        let named = global.config.clone().or_else(|| variable(FILE_VARIABLE).map(PathBuf::from));
        let mut sources = Sources::new()
            .file(named)
            .environment(ours)
            .allow_variables([FILE_VARIABLE])
            .flag("ctl.server", "--server", global.server.as_ref())
            .flag("ctl.output", "--output", global.output)
            .flag("ctl.timeout", "--timeout", global.timeout)
            .flag("ctl.tls.ca_file", "--tls-ca-file", path(global.tls_ca_file.as_ref()))
            .flag("ctl.tls.cert_file", "--tls-cert-file", path(global.tls_cert_file.as_ref()))
            .flag("ctl.tls.key_file", "--tls-key-file", path(global.tls_key_file.as_ref()))
            .flag("ctl.tls.server_name", "--tls-server-name", global.tls_server_name.as_ref());
        if let Some(directory) = config_directory(variable) {
            sources = sources.fallback_file(directory.join("hypervisor").join("ctl.yaml"));
        }
        let loaded = sources.load::<Self>()?;
        let tls = &loaded.value.ctl.tls;
        if tls.cert_file.is_some() != tls.key_file.is_some() {
            return Err(
                loaded.refuse("ctl.tls.cert_file", "a certificate and its key_file must be set together")
            );
        }
        if tls.cert_file.is_some() && tls.ca_file.is_none() {
            return Err(loaded.refuse("ctl.tls.ca_file", "must be set too where a certificate is"));
        }
        Ok(loaded)
    }

    /// How the server is reached.
    pub fn client_options(&self) -> ClientOptions {
        let tls = self.ctl.tls.clone();
        let tls = tls.ca_file.map(|ca| ClientTls {
            ca,
            cert: tls.cert_file,
            key: tls.key_file,
            domain: tls.server_name,
        });
        ClientOptions { tls, ..ClientOptions::new(self.ctl.server.clone()) }
    }
}

fn is_ours(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(PREFIX.as_bytes())
}

fn path(path: Option<&PathBuf>) -> Option<String> {
    path.map(|path| path.display().to_string())
}

/// Where users keep settings (XDG base directory specification, section 3).
fn config_directory(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let own = variable("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    own.or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".config")))
}
