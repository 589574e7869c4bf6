//! Finds the object that a name, an id or the beginning of an id means.
//!
//! An exact id wins over an exact name, an exact name over a beginning. What remains must be one object.

use hv_proto::convert::instance_type_to;
use hv_proto::v1;
use hv_types::InstanceType;

use crate::error::CtlError;
use crate::output::text::escape;
use crate::server::Server;

/// Most candidates that an ambiguity lists.
const MAX_CANDIDATES: usize = 10;
/// How many objects are asked for: one more than is listed.
const PAGE_SIZE: i32 = 11;

/// What can be referred to.
pub(crate) trait Referable {
    fn id(&self) -> &str;
    fn name(&self) -> &str;
}

impl Referable for v1::Instance {
    fn id(&self) -> &str {
        &self.id
    }

    fn name(&self) -> &str {
        &self.name
    }
}

impl Referable for v1::Node {
    fn id(&self) -> &str {
        &self.id
    }

    fn name(&self) -> &str {
        &self.hostname
    }
}

/// The noun of a type, for messages and for `-o name`.
pub(crate) fn noun(only: Option<InstanceType>) -> &'static str {
    only.map_or("instance", InstanceType::name)
}

/// The instance that is meant, of this type if one is given.
pub(crate) async fn instance(
    server: &Server,
    only: Option<InstanceType>,
    reference: &str,
) -> Result<v1::Instance, CtlError> {
    let bare = bare(reference, &["instance", "vm", "container", "microvm"])?;
    let request = v1::ListInstancesRequest {
        r#type: only.map_or(0, |only| instance_type_to(only) as i32),
        reference: bare.to_owned(),
        page_size: PAGE_SIZE,
        ..Default::default()
    };
    let found = server.call(async || server.compute().list_instances(request.clone()).await).await?;
    choose(noun(only), bare, found.instances)
}

/// The node that is meant.
pub(crate) async fn node(server: &Server, reference: &str) -> Result<v1::Node, CtlError> {
    let bare = bare(reference, &["node"])?;
    let request =
        v1::ListNodesRequest { reference: bare.to_owned(), page_size: PAGE_SIZE, ..Default::default() };
    let found = server.call(async || server.cluster().list_nodes(request.clone()).await).await?;
    choose("node", bare, found.nodes)
}

/// The reference without the `kind/` that `-o name` prints.
fn bare<'a>(reference: &'a str, kinds: &[&str]) -> Result<&'a str, CtlError> {
    let bare = match reference.split_once('/') {
        Some((kind, bare)) if kinds.contains(&kind) => bare,
        _ => reference,
    };
    if bare.is_empty() {
        return Err(CtlError::Usage("a name or an id must not be empty".to_owned()));
    }
    Ok(bare)
}

/// The one object that is meant by `reference` among those that fit it in some way.
fn choose<T: Referable>(kind: &'static str, reference: &str, mut found: Vec<T>) -> Result<T, CtlError> {
    if let Some(index) = found.iter().position(|object| object.id() == reference) {
        return Ok(found.swap_remove(index));
    }
    // A server that does not know references would send everything.
    found.retain(|object| object.name() == reference || object.id().starts_with(reference));
    if found.iter().any(|object| object.name() == reference) {
        found.retain(|object| object.name() == reference);
    }
    if found.len() > 1 {
        let more = if found.len() > MAX_CANDIDATES { "\n  …" } else { "" };
        let line = |object: &T| format!("  {}  {}", escape(object.id()), escape(object.name()));
        let lines: Vec<String> = found.iter().take(MAX_CANDIDATES).map(line).collect();
        let candidates = format!("{}{more}", lines.join("\n"));
        return Err(CtlError::Ambiguous { kind, reference: shorten(reference), candidates });
    }
    found.pop().ok_or_else(|| CtlError::NotFound { kind, reference: shorten(reference) })
}

/// A message must stay one readable line.
fn shorten(reference: &str) -> String {
    const SHOWN_CHARS: usize = 64;
    if reference.chars().count() <= SHOWN_CHARS {
        return reference.to_owned();
    }
    format!("{}…", reference.chars().take(SHOWN_CHARS).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instances(pairs: &[(&str, &str)]) -> Vec<v1::Instance> {
        let instance = |(id, name): &(&str, &str)| v1::Instance {
            id: (*id).into(),
            name: (*name).into(),
            ..Default::default()
        };
        pairs.iter().map(instance).collect()
    }

    #[test]
    fn an_exact_id_wins_over_a_name_and_a_name_over_a_beginning() {
        let all = [("ab", "web"), ("abc", "ab"), ("abd", "db")];
        assert_eq!(choose("instance", "ab", instances(&all)).unwrap().name, "web");
        assert_eq!(choose("instance", "web", instances(&all)).unwrap().id, "ab");
        assert_eq!(choose("instance", "ab", instances(&all[1..])).unwrap().id, "abc");
    }

    #[test]
    fn an_ambiguous_beginning_lists_the_candidates() {
        let error = choose("vm", "0", instances(&[("01", "a"), ("02", "b\u{7}")])).unwrap_err();
        assert_eq!(error.to_string(), "\"0\" fits several vms, give more of the id:\n  01  a\n  02  b\\u{7}");
        let many: Vec<(String, &str)> = (0..11).map(|n| (format!("0{n}"), "x")).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|(id, name)| (id.as_str(), *name)).collect();
        assert!(choose("vm", "0", instances(&many)).unwrap_err().to_string().ends_with("\n  …"));
    }

    #[test]
    fn nothing_found_is_said_with_the_command_that_lists() {
        let error = choose("vm", "x", instances(&[])).unwrap_err();
        assert!(error.to_string().contains("hypervisor-ctl vm list"), "{error}");
        assert_eq!(error.exit_code(), crate::exit_code::NOT_FOUND);
    }

    #[test]
    fn what_the_name_output_prints_is_understood() {
        assert_eq!(bare("instance/web", &["instance"]).unwrap(), "web");
        assert_eq!(bare("web", &["instance"]).unwrap(), "web");
        assert!(bare("", &["instance"]).is_err() && bare("instance/", &["instance"]).is_err());
    }
}
