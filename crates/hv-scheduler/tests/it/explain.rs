//! Claims about explanations.

use std::sync::Arc;

use hv_scheduler::{Ask, Fleet, MAX_BEST, MAX_EXAMPLES, Rule, Strategy};
use hv_types::placement::{PlacementRules, Topology};

use crate::world::{affinity, ask, ask_with, instance, instance_id, node, node_id, rng, spread};

fn small_nodes() -> Fleet {
    let mut fleet = Fleet::new();
    let mut down = node("n1", 4, 1024);
    down.live = false;
    for view in [down, node("n2", 1, 1024), node("n3", 1, 1024)] {
        fleet.upsert_node(view);
    }
    fleet
}

#[test]
fn the_summary_counts_per_rule_and_names_the_remedy() {
    let wanted = ask("i", 2, 512);
    let text = "none of 3 nodes can take it: 1 not ready, 2 with fewer than 2 free cores; free room, ask for less, or add a node";
    let mut fleet = small_nodes();
    assert_eq!(fleet.explain(&wanted, Strategy::Spread).summary(), text);
    assert_eq!(fleet.place(&wanted, Strategy::Spread, &mut rng()).unwrap_err().summary(&wanted), text);
    let empty = Fleet::new().explain(&wanted, Strategy::Spread);
    assert_eq!(empty.summary(), "no node is registered: start hypervisor-agent on a machine");
    assert_eq!(empty.remedies, []);
}

#[test]
fn remedies_promise_what_lifting_one_rule_alone_would_admit() {
    let explanation = small_nodes().explain(&ask("i", 2, 512), Strategy::Spread);
    let remedies: Vec<_> =
        explanation.remedies.iter().map(|r| (r.rule, r.admits, r.message.as_str())).collect();
    let expected = [
        (Rule::Cpu, 2, "2 nodes have 1 free cores, it asks for 2: free room, ask for less, or add a node"),
        (
            Rule::NotReady,
            1,
            "1 node is rejected only as not ready: start the agents of the nodes that are down",
        ),
    ];
    assert_eq!(remedies, expected);
    assert!(explanation.best.is_empty() && explanation.fitting == 0);
    assert_eq!(explanation.rejected[1].examples, ["n2", "n3"]);
}

#[test]
fn where_no_single_change_is_enough_it_is_said() {
    let mut record = instance("i", 2, 512);
    record.placement = Arc::new(PlacementRules { zone: "z9".into(), ..PlacementRules::default() });
    let explanation = small_nodes().explain(&Ask::of(&record), Strategy::Spread);
    assert_eq!(explanation.remedies.len(), 1);
    assert_eq!((explanation.remedies[0].rule, explanation.remedies[0].admits), (Rule::Zone, 0));
}

#[test]
fn the_best_are_listed_with_what_their_score_is_made_of() {
    let mut fleet = Fleet::new();
    for index in 0..9 {
        fleet.upsert_node(node(&format!("n{index}"), 10, 1000));
        let filler = ask("x", index, 100 * u64::from(index));
        fleet.bind(&instance_id(&format!("x{index}")), &filler, &node_id(&format!("n{index}")));
    }
    let explanation = fleet.explain(&ask("i", 2, 200), Strategy::Spread);
    assert_eq!((explanation.total, explanation.fitting, explanation.best.len()), (9, 9, MAX_BEST));
    let best = &explanation.best[0];
    assert_eq!(best.hostname, "n0");
    assert_eq!(best.message, "20 % full with it (the emptiest is preferred); 8 cores and 800 MiB stay free");
    assert!(explanation.best.windows(2).all(|pair| pair[0].score > pair[1].score));
    assert_eq!(explanation.summary(), format!("9 of 9 nodes can take it; n0 is the best: {}", best.message));
    let full = fleet.explain(&ask("i", 9, 900), Strategy::Spread);
    let cpu = full.rejected.iter().find(|rejected| rejected.rule == Rule::Cpu).unwrap();
    assert_eq!((cpu.nodes, cpu.examples.len()), (7, MAX_EXAMPLES));
}

#[test]
fn preferences_are_counted_in_the_score() {
    let mut fleet = Fleet::new();
    for name in ["n1", "n2"] {
        fleet.upsert_node(node(name, 8, 8192));
    }
    let web = ask_with("web", &[("app", "web")], PlacementRules::default());
    fleet.bind(web.id(), &web, &node_id("n1"));
    let wanted = ask_with("i", &[], affinity(false, Topology::Node, false));
    let explanation = fleet.explain(&wanted, Strategy::Spread);
    assert_eq!(explanation.best[0].hostname, "n1");
    assert_eq!((explanation.best[0].parts.preferences_met, explanation.best[0].parts.preferences), (1, 1));
    assert!(explanation.best[0].message.contains("meets 1 of 1 preferences"));
    let evenly =
        fleet.explain(&ask_with("j", &[("app", "web")], spread(Topology::Node, 1, true)), Strategy::Spread);
    assert_eq!((evenly.fitting, evenly.rejected[0].rule), (1, Rule::Spread));
}
