//! The layout of the key space. Nothing else spells a key.

use bytes::Bytes;

use hv_types::{InstanceId, NodeId, RequestKey};

/// Where everything lies unless the operator says otherwise.
pub const DEFAULT_PREFIX: &str = "/hypervisor";

/// Makes keys under one prefix.
#[derive(Clone, Debug)]
pub struct Keys {
    prefix: String,
}

impl Default for Keys {
    fn default() -> Self {
        Self::new(DEFAULT_PREFIX)
    }
}

/// What a key stands for, for those who follow the whole key space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key<'a> {
    /// `nodes/{id}`
    Node(&'a str),
    /// `instances/{id}`
    Instance(&'a str),
    /// `leases/nodes/{id}`
    NodeLease(&'a str),
    /// `holds/nodes/{id}`
    NodeHold(&'a str),
    /// `events/{id}`
    Event(&'a str),
    /// `operations/{id}`
    Operation(&'a str),
    /// `names/{project}/instance-set/{name}`
    InstanceSet {
        /// Whose it is.
        project: &'a str,
        /// Its name.
        name: &'a str,
    },
    /// `config/cluster`
    Cluster,
    /// Any other.
    Other,
}

impl Keys {
    /// Keys under `prefix`, which may end with a slash or not.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        Self { prefix: format!("{}/", prefix.trim_end_matches('/')) }
    }

    fn key(&self, path: &str) -> Bytes {
        Bytes::from(format!("{}{path}", self.prefix))
    }

    /// The prefix of everything.
    #[must_use]
    pub fn all(&self) -> Bytes {
        self.key("")
    }

    /// One node.
    #[must_use]
    pub fn node(&self, id: &NodeId) -> Bytes {
        self.key(&format!("nodes/{id}"))
    }

    /// All nodes.
    #[must_use]
    pub fn nodes(&self) -> Bytes {
        self.key("nodes/")
    }

    /// A node's sign of life; attached to the node's lease.
    #[must_use]
    pub fn node_lease(&self, id: &NodeId) -> Bytes {
        self.key(&format!("leases/nodes/{id}"))
    }

    /// All nodes' signs of life.
    #[must_use]
    pub fn node_leases(&self) -> Bytes {
        self.key("leases/nodes/")
    }

    /// While it is there nothing new is bound to the node; leased.
    #[must_use]
    pub fn node_hold(&self, id: &NodeId) -> Bytes {
        self.key(&format!("holds/nodes/{id}"))
    }

    /// All holds of nodes.
    #[must_use]
    pub fn node_holds(&self) -> Bytes {
        self.key("holds/nodes/")
    }

    /// One instance.
    #[must_use]
    pub fn instance(&self, id: &InstanceId) -> Bytes {
        self.key(&format!("instances/{id}"))
    }

    /// All instances.
    #[must_use]
    pub fn instances(&self) -> Bytes {
        self.key("instances/")
    }

    /// The owner of an instance name: its value is the instance's id.
    #[must_use]
    pub fn instance_name(&self, project: &str, name: &str) -> Bytes {
        self.key(&format!("names/{project}/instance/{name}"))
    }

    /// The owner of the names `{name}-1`, `{name}-2`, …, which no other instance may have while the key is there.
    #[must_use]
    pub fn instance_set(&self, project: &str, name: &str) -> Bytes {
        self.key(&format!("names/{project}/instance-set/{name}"))
    }

    /// All names `{name}-` with a digit behind it, of instances that were created one by one. (`:` follows `9`.)
    #[must_use]
    pub fn numbered_instance_names(&self, project: &str, name: &str) -> (Bytes, Bytes) {
        let with = |end: char| self.key(&format!("names/{project}/instance/{name}-{end}"));
        (with('0'), with(':'))
    }

    /// All names.
    #[must_use]
    pub fn names(&self) -> Bytes {
        self.key("names/")
    }

    /// All names of a project.
    #[must_use]
    pub fn names_of(&self, project: &str) -> Bytes {
        self.key(&format!("names/{project}/"))
    }

    /// The project of a name's key.
    #[must_use]
    pub fn project_of_name<'a>(&self, key: &'a [u8]) -> Option<&'a str> {
        let path = key.strip_prefix(self.names().as_ref())?;
        std::str::from_utf8(path).ok()?.split_once('/').map(|(project, _)| project)
    }

    /// One operation.
    #[must_use]
    pub fn operation(&self, id: &str) -> Bytes {
        self.key(&format!("operations/{id}"))
    }

    /// All operations.
    #[must_use]
    pub fn operations(&self) -> Bytes {
        self.key("operations/")
    }

    /// What a request key led to; leased.
    #[must_use]
    pub fn request(&self, key: &RequestKey) -> Bytes {
        self.key(&format!("requests/{key}"))
    }

    /// The cluster's identity and settings.
    #[must_use]
    pub fn cluster(&self) -> Bytes {
        self.key("config/cluster")
    }

    /// A backup that is being taken over.
    #[must_use]
    pub fn restore(&self) -> Bytes {
        self.key("restore")
    }

    /// Who leads a part; leased.
    #[must_use]
    pub fn leader(&self, part: &str) -> Bytes {
        self.key(&format!("leader/{part}"))
    }

    /// One event.
    #[must_use]
    pub fn event(&self, id: &str) -> Bytes {
        self.key(&format!("events/{id}"))
    }

    /// All events.
    #[must_use]
    pub fn events(&self) -> Bytes {
        self.key("events/")
    }

    /// What a key stands for.
    #[must_use]
    pub fn parse<'a>(&self, key: &'a [u8]) -> Key<'a> {
        let Some(path) =
            key.strip_prefix(self.prefix.as_bytes()).and_then(|path| std::str::from_utf8(path).ok())
        else {
            return Key::Other;
        };
        let Some((kind, id)) = path.rsplit_once('/').filter(|(_, id)| !id.is_empty()) else {
            return Key::Other;
        };
        match kind {
            "nodes" => Key::Node(id),
            "instances" => Key::Instance(id),
            "leases/nodes" => Key::NodeLease(id),
            "holds/nodes" => Key::NodeHold(id),
            "events" => Key::Event(id),
            "operations" => Key::Operation(id),
            "config" if id == "cluster" => Key::Cluster,
            _ => match kind.strip_prefix("names/").and_then(|kind| kind.strip_suffix("/instance-set")) {
                Some(project) => Key::InstanceSet { project, name: id },
                None => Key::Other,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_is_parsed_back() {
        let keys = Keys::new("/x/");
        let node: NodeId = "n1".parse().unwrap();
        let instance: InstanceId = "i1".parse().unwrap();
        assert_eq!(keys.parse(&keys.node(&node)), Key::Node("n1"));
        assert_eq!(keys.parse(&keys.node_lease(&node)), Key::NodeLease("n1"));
        assert_eq!(keys.parse(&keys.instance(&instance)), Key::Instance("i1"));
        assert_eq!(keys.parse(&keys.instances()), Key::Other);
        assert_eq!(keys.parse(b"/other/nodes/n1"), Key::Other);
    }
}
