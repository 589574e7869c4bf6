//! Opens the store that the settings ask for.

use std::sync::Arc;

use anyhow::{Context, bail};
use hv_store::SharedStore;
use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_store::etcd::{EtcdOptions, EtcdStore, EtcdTls};

use crate::settings::{EtcdSettings, Settings};

/// The store of this server.
pub(crate) enum Opened {
    Embedded(Arc<EmbeddedStore>),
    Etcd(Arc<EtcdStore>),
}

impl Opened {
    pub(crate) fn shared(&self) -> SharedStore {
        match self {
            Self::Embedded(store) => store.clone(),
            Self::Etcd(store) => store.clone(),
        }
    }

    pub(crate) fn backend(&self) -> &'static str {
        match self {
            Self::Embedded(_) => "embedded",
            Self::Etcd(_) => "etcd",
        }
    }

    pub(crate) async fn close(self) {
        if let Self::Embedded(store) = self {
            store.close().await;
        }
    }
}

pub(crate) async fn open(settings: &Settings) -> anyhow::Result<Opened> {
    std::fs::create_dir_all(&settings.server.data_dir).with_context(|| {
        let dir = settings.server.data_dir.display();
        format!("server.data_dir: {dir} cannot be made; choose another with --data-dir")
    })?;
    if settings.etcd.endpoints.is_empty() {
        let dir = settings.server.data_dir.join("store");
        let store = EmbeddedStore::open(&dir, EmbeddedOptions::default())
            .with_context(|| format!("the store in {} cannot be opened", dir.display()))?;
        return Ok(Opened::Embedded(store));
    }
    let store = EtcdStore::connect(etcd_options(&settings.etcd)?)
        .await
        .with_context(|| format!("etcd.endpoints: {} cannot be used", settings.etcd.endpoints.join(", ")))?;
    Ok(Opened::Etcd(store))
}

fn etcd_options(settings: &EtcdSettings) -> anyhow::Result<EtcdOptions> {
    let tls = match (&settings.ca_file, &settings.cert_file, &settings.key_file) {
        (None, None, None) => None,
        (Some(ca), Some(cert), Some(key)) => {
            Some(EtcdTls { ca: ca.clone(), cert: cert.clone(), key: key.clone() })
        }
        _ => bail!("etcd.ca_file, etcd.cert_file and etcd.key_file belong together: set all three or none"),
    };
    let user =
        settings.username.clone().zip(settings.password.as_ref().map(|secret| secret.reveal().to_owned()));
    Ok(EtcdOptions {
        endpoints: settings.endpoints.clone(),
        tls,
        dial_timeout: settings.dial_timeout.get(),
        request_timeout: settings.request_timeout.get(),
        user,
        quota_bytes: Some(settings.quota.bytes()).filter(|bytes| *bytes > 0),
        ..EtcdOptions::default()
    })
}
