//! The calls to libvirtd as typed functions.

use std::time::Duration;

use tokio::sync::mpsc;
use uuid::Uuid;

use crate::problem::{Outcome, Problem};
use crate::protocol::{Call, call, event, flag};
use crate::rpc::{CALL_TIMEOUT, Connection, Event};
use crate::xdr::{Domain, Malformed, Params, Reader, Value, Writer};
use crate::xml::Element;

/// How long a new libvirtd may take to answer: it looks at every emulator first.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long memory may take to be written into a snapshot, or to be read.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_mins(10);
/// `VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE`.
const LEASES: u32 = 0;

/// A libvirtd that was opened.
pub(crate) struct Daemon {
    pub(crate) connection: Connection,
}

/// What `virDomainGetAllDomainStats` says of one domain.
pub(crate) struct DomainStats {
    pub(crate) uuid: Uuid,
    pub(crate) params: Params,
}

fn garbled(call: Call) -> impl FnOnce(Malformed) -> Problem {
    move |malformed| Problem::Garbled(call.name, malformed.into())
}

fn parsed(call: Call, document: &str) -> Outcome<Element> {
    Element::parse(document).map_err(|e| Problem::Garbled(call.name, e.into()))
}

impl Daemon {
    /// Connects to a socket, and asks for the events of all domains.
    pub(crate) async fn open(socket: &std::path::Path, uri: &str) -> Outcome<(Self, mpsc::Receiver<Event>)> {
        let (connection, events) = Connection::connect(socket).await?;
        let opening = async {
            let kinds = connection.call(call::AUTH_LIST, Writer::new()).await?;
            let kinds = Reader::new(&kinds).list(Reader::u32).map_err(garbled(call::AUTH_LIST))?;
            if kinds.iter().any(|kind| *kind != 0) {
                let reason = "it wants a password; run the agent as root, or set auth_unix_rw to none in libvirtd.conf";
                return Err(Problem::Unreachable(reason.to_owned()));
            }
            let arguments = Writer::new().optional_text(Some(uri)).u32(0);
            connection.call(call::OPEN, arguments).await?;
            for id in event::IDS {
                connection.call(call::REGISTER_EVENT, Writer::new().i32(id).u32(0)).await?;
            }
            Ok(())
        };
        let opened = tokio::time::timeout(OPEN_TIMEOUT, opening).await;
        opened.unwrap_or_else(|_| Err(Problem::Unreachable("it does not answer".to_owned())))?;
        Ok((Self { connection }, events))
    }

    async fn done(&self, call: Call, arguments: Writer) -> Outcome<()> {
        self.connection.call(call, arguments).await.map(drop)
    }

    async fn text(&self, call: Call, arguments: Writer) -> Outcome<String> {
        let answer = self.connection.call(call, arguments).await?;
        Reader::new(&answer).text().map_err(garbled(call))
    }

    async fn xml(&self, call: Call, arguments: Writer) -> Outcome<Element> {
        parsed(call, &self.text(call, arguments).await?)
    }

    /// The version of libvirt, as `9.0.0`.
    pub(crate) async fn version(&self) -> Outcome<(u64, String)> {
        let answer = self.connection.call(call::LIB_VERSION, Writer::new()).await?;
        let number = Reader::new(&answer).u64().map_err(garbled(call::LIB_VERSION))?;
        Ok((number, format!("{}.{}.{}", number / 1_000_000, number / 1000 % 1000, number % 1000)))
    }

    pub(crate) async fn capabilities(&self) -> Outcome<Element> {
        self.xml(call::CAPABILITIES, Writer::new()).await
    }

    /// What an emulator can do, of one kind (`kvm`, `qemu`).
    pub(crate) async fn domain_capabilities(&self, emulator: &str, kind: &str) -> Outcome<Element> {
        let arguments = Writer::new().optional_text(Some(emulator)).optional_text(None);
        let arguments = arguments.optional_text(Some("q35")).optional_text(Some(kind)).u32(0);
        self.xml(call::DOMAIN_CAPABILITIES, arguments).await
    }

    pub(crate) async fn has_network(&self, name: &str) -> Outcome<bool> {
        match self.done(call::NETWORK_LOOKUP, Writer::new().text(name)).await {
            Ok(()) => Ok(true),
            Err(Problem::Refused { .. }) => Ok(false),
            Err(other) => Err(other),
        }
    }

    /// The directory of a storage pool; `None` if there is no such pool, or it has no directory.
    pub(crate) async fn pool_directory(&self, name: &str) -> Outcome<Option<String>> {
        let pool = match self.connection.call(call::POOL_LOOKUP, Writer::new().text(name)).await {
            Ok(pool) => pool,
            Err(Problem::Refused { .. }) => return Ok(None),
            Err(other) => return Err(other),
        };
        // The answer is the pool, as the next call takes it.
        let document = self.xml(call::POOL_XML, Writer::new().fixed(&pool).u32(0)).await?;
        Ok(document.text_at("target/path").map(str::to_owned))
    }

    pub(crate) async fn define(&self, document: &Element) -> Outcome<Domain> {
        let answer = self.connection.call(call::DEFINE, Writer::new().text(&document.to_xml()).u32(0)).await?;
        Reader::new(&answer).domain().map_err(garbled(call::DEFINE))
    }

    pub(crate) async fn domain_xml(&self, domain: &Domain, flags: u32) -> Outcome<Element> {
        self.xml(call::DOMAIN_XML, Writer::new().domain(domain).u32(flags)).await
    }

    pub(crate) async fn create(&self, domain: &Domain) -> Outcome<()> {
        self.done(call::CREATE, Writer::new().domain(domain).u32(flag::START)).await
    }

    /// The state and its reason; `None` if the domain is not known.
    pub(crate) async fn state(&self, domain: &Domain) -> Outcome<Option<(i32, i32)>> {
        match self.connection.call(call::STATE, Writer::new().domain(domain).u32(0)).await {
            Ok(answer) => {
                let mut reader = Reader::new(&answer);
                let mut read = || Ok((reader.i32()?, reader.i32()?));
                read().map(Some).map_err(garbled(call::STATE))
            }
            Err(problem) if problem.is_no_domain() => Ok(None),
            Err(other) => Err(other),
        }
    }

    pub(crate) async fn suspend(&self, domain: &Domain) -> Outcome<()> {
        self.done(call::SUSPEND, Writer::new().domain(domain)).await
    }

    pub(crate) async fn resume(&self, domain: &Domain) -> Outcome<()> {
        self.done(call::RESUME, Writer::new().domain(domain)).await
    }

    pub(crate) async fn press_power_button(&self, domain: &Domain) -> Outcome<()> {
        self.done(call::SHUTDOWN, Writer::new().domain(domain).u32(flag::POWER_BUTTON)).await
    }

    /// Kills it; what is gone, or does not run, is killed.
    pub(crate) async fn destroy(&self, domain: &Domain) -> Outcome<()> {
        match self.done(call::DESTROY, Writer::new().domain(domain).u32(0)).await {
            Err(problem) if problem.is_no_domain() || problem.is_wrong_state() => Ok(()),
            other => other,
        }
    }

    pub(crate) async fn undefine(&self, domain: &Domain) -> Outcome<()> {
        let undefine = |flags| self.done(call::UNDEFINE, Writer::new().domain(domain).u32(flags));
        let outcome = match undefine(flag::UNDEFINE | flag::UNDEFINE_TPM).await {
            // A libvirt that does not know of TPMs.
            Err(Problem::Refused { .. }) => undefine(flag::UNDEFINE).await,
            other => other,
        };
        match outcome {
            Err(problem) if problem.is_no_domain() => Ok(()),
            other => other,
        }
    }

    /// The counters of every domain that runs, in one call.
    pub(crate) async fn all_stats(&self) -> Outcome<Vec<DomainStats>> {
        let arguments = Writer::new().u32(0).u32(flag::STATS).u32(flag::STATS_ACTIVE);
        let answer = self.connection.call(call::ALL_STATS, arguments).await?;
        let records = Reader::new(&answer).list(|reader| {
            let domain = reader.domain()?;
            Ok(DomainStats { uuid: domain.uuid, params: reader.params()? })
        });
        records.map_err(garbled(call::ALL_STATS))
    }

    /// The first IPv4 address that a libvirt network gave it.
    pub(crate) async fn leased_address(&self, domain: &Domain) -> Outcome<Option<std::net::IpAddr>> {
        let arguments = Writer::new().domain(domain).u32(LEASES).u32(0);
        let answer = self.connection.call(call::INTERFACE_ADDRESSES, arguments).await?;
        let interfaces = Reader::new(&answer).list(|reader| {
            let _name = reader.text()?;
            let _mac = reader.optional_text()?;
            reader.list(|reader| {
                let _kind = reader.i32()?;
                let address = reader.text()?;
                let _prefix = reader.u32()?;
                Ok(address)
            })
        });
        let addresses = interfaces.map_err(garbled(call::INTERFACE_ADDRESSES))?.into_iter().flatten();
        Ok(addresses.filter_map(|text| text.parse().ok()).find(std::net::IpAddr::is_ipv4))
    }

    /// Says something to the guest's agent, and returns its answer.
    pub(crate) async fn agent(&self, domain: &Domain, command: &str, timeout_s: i32) -> Outcome<String> {
        let arguments = Writer::new().domain(domain).text(command).i32(timeout_s).u32(0);
        let answer = self.connection.call(call::AGENT_COMMAND, arguments).await?;
        let answer = Reader::new(&answer).optional_text().map_err(garbled(call::AGENT_COMMAND))?;
        Ok(answer.unwrap_or_default())
    }

    pub(crate) async fn attach(&self, domain: &Domain, device: &Element, flags: u32) -> Outcome<()> {
        let arguments = Writer::new().domain(domain).text(&device.to_xml()).u32(flags);
        self.done(call::ATTACH_DEVICE, arguments).await
    }

    pub(crate) async fn detach(&self, domain: &Domain, device: &Element, flags: u32) -> Outcome<()> {
        let arguments = Writer::new().domain(domain).text(&device.to_xml()).u32(flags);
        self.done(call::DETACH_DEVICE, arguments).await
    }

    pub(crate) async fn set_vcpus(&self, domain: &Domain, count: u32, flags: u32) -> Outcome<()> {
        self.done(call::SET_VCPUS, Writer::new().domain(domain).u32(count).u32(flags)).await
    }

    pub(crate) async fn resize_disk(&self, domain: &Domain, disk: &str, bytes: u64) -> Outcome<()> {
        let arguments = Writer::new().domain(domain).text(disk).u64(bytes).u32(flag::RESIZE_BYTES);
        self.done(call::BLOCK_RESIZE, arguments).await
    }

    pub(crate) async fn snapshot(&self, domain: &Domain, document: &Element) -> Outcome<()> {
        let arguments = Writer::new().domain(domain).text(&document.to_xml()).u32(0);
        self.connection.call_within(call::SNAPSHOT_CREATE, arguments, SNAPSHOT_TIMEOUT).await.map(drop)
    }

    pub(crate) async fn snapshot_names(&self, domain: &Domain) -> Outcome<Vec<String>> {
        let arguments = Writer::new().domain(domain).i32(1).u32(flag::PARENTS_FIRST);
        let answer = self.connection.call(call::LIST_SNAPSHOTS, arguments).await?;
        let names = Reader::new(&answer).list(|reader| {
            let name = reader.text()?;
            reader.domain()?;
            Ok(name)
        });
        names.map_err(garbled(call::LIST_SNAPSHOTS))
    }

    /// What a snapshot is; `None` if there is none of that name.
    pub(crate) async fn snapshot_xml(&self, domain: &Domain, name: &str) -> Outcome<Option<Element>> {
        let lookup = Writer::new().domain(domain).text(name).u32(0);
        match self.connection.call(call::SNAPSHOT_LOOKUP, lookup).await {
            Ok(_) => {}
            Err(problem) if problem.is_no_snapshot() => return Ok(None),
            Err(other) => return Err(other),
        }
        let arguments = Writer::new().text(name).domain(domain).u32(0);
        self.xml(call::SNAPSHOT_XML, arguments).await.map(Some)
    }

    pub(crate) async fn revert(&self, domain: &Domain, name: &str) -> Outcome<()> {
        let arguments = Writer::new().text(name).domain(domain).u32(flag::REVERT_FORCE);
        self.connection.call_within(call::SNAPSHOT_REVERT, arguments, SNAPSHOT_TIMEOUT).await.map(drop)
    }

    pub(crate) async fn delete_snapshot(&self, domain: &Domain, name: &str) -> Outcome<()> {
        let arguments = Writer::new().text(name).domain(domain).u32(0);
        match self.connection.call_within(call::SNAPSHOT_DELETE, arguments, SNAPSHOT_TIMEOUT).await {
            Err(problem) if problem.is_no_snapshot() => Ok(()),
            other => other.map(drop),
        }
    }

    /// How far the present job is: its kind (`virDomainJobType`) and numbers.
    pub(crate) async fn job(&self, domain: &Domain) -> Outcome<(i32, Params)> {
        let answer = self.connection.call(call::JOB_STATS, Writer::new().domain(domain).u32(0)).await?;
        let mut reader = Reader::new(&answer);
        let mut read = || Ok((reader.i32()?, reader.params()?));
        read().map_err(garbled(call::JOB_STATS))
    }

    pub(crate) async fn abort_job(&self, domain: &Domain) -> Outcome<()> {
        self.done(call::ABORT_JOB, Writer::new().domain(domain)).await
    }

    pub(crate) async fn set_max_downtime(&self, domain: &Domain, ms: u64) -> Outcome<()> {
        self.done(call::SET_MAX_DOWNTIME, Writer::new().domain(domain).u64(ms).u32(0)).await
    }

    /// Begins a migration at the source: a cookie for the target, and the domain as the target is to run it.
    pub(crate) async fn migrate_begin(
        &self,
        domain: &Domain,
        params: &[(&str, Value)],
        flags: u32,
    ) -> Outcome<(Vec<u8>, String)> {
        let arguments = Writer::new().domain(domain).params(params).u32(flags);
        let answer = self.connection.call(call::MIGRATE_BEGIN, arguments).await?;
        let mut reader = Reader::new(&answer);
        let mut read = || Ok((reader.opaque()?.to_vec(), reader.text()?));
        read().map_err(garbled(call::MIGRATE_BEGIN))
    }

    /// Prepares the target: a cookie for the source, and where it waits.
    pub(crate) async fn migrate_prepare(
        &self,
        params: &[(&str, Value)],
        cookie: &[u8],
        flags: u32,
    ) -> Outcome<(Vec<u8>, Option<String>)> {
        let arguments = Writer::new().params(params).opaque(cookie).u32(flags);
        let answer =
            self.connection.call_within(call::MIGRATE_PREPARE, arguments, CALL_TIMEOUT * 2).await?;
        let mut reader = Reader::new(&answer);
        let mut read = || Ok((reader.opaque()?.to_vec(), reader.optional_text()?));
        read().map_err(garbled(call::MIGRATE_PREPARE))
    }

    /// Sends everything; returns when it is there.
    pub(crate) async fn migrate_perform(
        &self,
        domain: &Domain,
        params: &[(&str, Value)],
        cookie: &[u8],
        flags: u32,
        timeout: Duration,
    ) -> Outcome<Vec<u8>> {
        let arguments =
            Writer::new().domain(domain).optional_text(None).params(params).opaque(cookie).u32(flags);
        let answer = self.connection.call_within(call::MIGRATE_PERFORM, arguments, timeout).await?;
        Ok(Reader::new(&answer).opaque().map_err(garbled(call::MIGRATE_PERFORM))?.to_vec())
    }

    /// Tells the target that everything is there, or that nothing more comes.
    pub(crate) async fn migrate_finish(
        &self,
        params: &[(&str, Value)],
        cookie: &[u8],
        flags: u32,
        is_cancelled: bool,
    ) -> Outcome<()> {
        let arguments = Writer::new().params(params).opaque(cookie).u32(flags).i32(i32::from(is_cancelled));
        self.done(call::MIGRATE_FINISH, arguments).await
    }

    /// Ends a migration at the source that failed: what was there goes on.
    pub(crate) async fn migrate_cancel(&self, domain: &Domain, flags: u32) -> Outcome<()> {
        let arguments = Writer::new().domain(domain).u32(0).opaque(&[]).u32(flags).i32(1);
        self.done(call::MIGRATE_CONFIRM, arguments).await
    }
}
