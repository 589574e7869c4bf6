//! How many decisions the scheduler makes in a second: `cargo run --release -p hv-scheduler --example bench [-- --json]`.
//!
//! # Method
//! 10,000 nodes of four sizes in 10 classes of zone and label. Every decision also binds its result, so the fleet fills as
//! it goes. Each bar is measured [`RUNS`] times on a fresh fleet, one thread, and the median counts: once with the asks
//! made beforehand, which is the decision alone, and once with making each ask from its instance's record. The baseline is
//! measured in the same run: the same rules over the same nodes, row by row, as a scheduler without columns, groups or
//! memory does it. Where other programs want the processor too, the figure by the time that this thread had one is the
//! one to compare; the ratio is made of such figures.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use hv_scheduler::{Ask, Fleet, Images, NEAR, NodeView, Strategy, fullness};
use hv_types::placement::PlacementRules;
use hv_types::{InstanceId, InstanceRecord, InstanceSpec, InstanceType, NodeId, Resources, Selector};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Nodes of the fleet.
const NODES: usize = 10_000;
/// Classes of zone and label.
const CLASSES: usize = 10;
/// How often each figure is taken.
const RUNS: usize = 5;
/// Decisions of one run.
const DECISIONS: usize = 200_000;
/// Decisions of one run of the baseline, which is slow.
const BASELINE_DECISIONS: usize = 400;

fn node(index: usize) -> NodeView {
    let class = index % CLASSES;
    let hostname = format!("node-{index:05}");
    // Four sizes of machine, spread over all classes.
    let cores = [32, 64, 96, 128][index / CLASSES % 4];
    let labels = [
        ("hypervisor/hostname".to_owned(), hostname.clone()),
        ("pool".to_owned(), format!("p{}", class % 5)),
        ("disk".to_owned(), "ssd".to_owned()),
    ];
    NodeView {
        id: id(&hostname),
        hostname,
        live: true,
        open: true,
        types: vec![InstanceType::Vm],
        images: Images { any: vec![InstanceType::Vm], ..Images::default() },
        region: "r1".into(),
        zone: format!("z{class}"),
        labels: labels.into(),
        taints: Vec::new(),
        devices: Default::default(),
        schedulable: Resources {
            cpu_cores: cores,
            memory_bytes: u64::from(cores) << 32,
            disk_bytes: 8 << 40,
            gpu_count: 0,
        },
    }
}

fn id(name: &str) -> NodeId {
    name.parse().expect("a node's name is an identifier")
}

fn record(index: usize, spec: Arc<InstanceSpec>, placement: Arc<PlacementRules>) -> InstanceRecord {
    InstanceRecord {
        project: format!("project-{}", index % 50),
        placement,
        ..InstanceRecord::pending(
            InstanceId::generate(),
            &format!("instance-{index}"),
            InstanceType::Vm,
            spec,
        )
    }
}

fn spec(cpu_cores: u32, memory_bytes: u64) -> Arc<InstanceSpec> {
    Arc::new(InstanceSpec { image: "debian-13".into(), cpu_cores, memory_bytes, ..InstanceSpec::default() })
}

/// Anywhere, in a pool, or in a zone.
fn placements() -> Vec<Arc<PlacementRules>> {
    let selector = |pool: usize| {
        Selector::new([("pool".to_owned(), format!("p{pool}"))].into()).expect("a label that is allowed")
    };
    let anywhere = PlacementRules::default();
    let mut all = vec![anywhere.clone(), anywhere.clone()];
    all.extend((0..3).map(|pool| PlacementRules { node_selector: selector(pool), ..anywhere.clone() }));
    all.extend((0..3).map(|zone| PlacementRules { zone: format!("z{zone}"), ..anywhere.clone() }));
    all.into_iter().map(Arc::new).collect()
}

/// Eight shapes: where, times how much.
fn eight_shapes(count: usize) -> Vec<InstanceRecord> {
    let sizes = [(1, 2), (2, 4), (2, 8), (2, 16), (4, 8), (1, 4), (2, 4), (2, 8)];
    let shapes: Vec<_> = placements()
        .into_iter()
        .zip(sizes)
        .map(|(placement, (cores, gib))| (spec(cores, gib << 30), placement))
        .collect();
    (0..count)
        .map(|index| {
            let (spec, placement) = &shapes[index % shapes.len()];
            record(index, spec.clone(), placement.clone())
        })
        .collect()
}

/// Every instance with amounts of its own.
fn all_different(count: usize) -> Vec<InstanceRecord> {
    let mut rng = StdRng::seed_from_u64(1);
    let placements = placements();
    (0..count)
        .map(|index| {
            let memory = (512 << 20) + ((rng.random_range(0..8u64 << 30) >> 20) << 20) + index as u64 * 4096;
            record(index, spec(rng.random_range(1..=8), memory), placements[index % placements.len()].clone())
        })
        .collect()
}

/// What one run came to.
#[derive(Clone, Copy)]
struct Outcome {
    per_second: f64,
    /// By the time that the thread had a processor: the same on an idle machine.
    per_cpu_second: f64,
    placed: usize,
}

/// A point in time, and how long this thread has had a processor until then.
struct Watch(Instant, Option<f64>);

impl Watch {
    fn start() -> Self {
        Self(Instant::now(), cpu_seconds())
    }

    fn outcome(&self, decisions: usize, placed: usize) -> Outcome {
        let wall = self.0.elapsed().as_secs_f64();
        let cpu = self.1.zip(cpu_seconds()).map_or(wall, |(begin, end)| end - begin);
        Outcome { per_second: decisions as f64 / wall, per_cpu_second: decisions as f64 / cpu, placed }
    }
}

/// Seconds that this thread has had a processor; `None` where the system does not say.
fn cpu_seconds() -> Option<f64> {
    // On Linux the first number, in nanoseconds.
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split_whitespace().next()?.parse::<u64>().ok().map(|nanoseconds| nanoseconds as f64 / 1e9)
}

fn run_fleet(records: &[InstanceRecord], strategy: Strategy, asks_beforehand: bool) -> Outcome {
    let mut fleet = Fleet::new();
    (0..NODES).for_each(|index| _ = fleet.upsert_node(node(index)));
    let asks: Vec<_> = if asks_beforehand { records.iter().map(Ask::of).collect() } else { Vec::new() };
    let mut rng = StdRng::seed_from_u64(2);
    let mut placed = 0;
    let mut decide = |ask: &Ask| {
        if let Ok(node) = fleet.place(ask, strategy, &mut rng) {
            fleet.bind_at(ask.id(), ask, node.index);
            placed += 1;
        }
    };
    let watch = Watch::start();
    if asks_beforehand {
        asks.iter().for_each(&mut decide);
    } else {
        records.iter().for_each(|record| decide(&Ask::of(record)));
    }
    watch.outcome(records.len(), placed)
}

/// The same decisions, row by row.
fn run_rows(records: &[InstanceRecord], strategy: Strategy) -> Outcome {
    let nodes: Vec<_> = (0..NODES).map(node).collect();
    let mut allocated = vec![Resources::default(); NODES];
    let mut bound = HashMap::new();
    let mut rng = StdRng::seed_from_u64(2);
    let watch = Watch::start();
    for record in records {
        let (rules, need) = (&record.placement, record.resources());
        let mut scored = Vec::new();
        for (index, node) in nodes.iter().enumerate() {
            let free = node.schedulable.minus(allocated[index]);
            let fits = rules.preferred_node.as_ref().is_none_or(|id| *id == node.id)
                && node.live
                && node.open
                && node.types.contains(&record.instance_type)
                && (rules.region.is_empty() || rules.region == node.region)
                && (rules.zone.is_empty() || rules.zone == node.zone)
                && rules.node_selector.matches(&node.labels)
                && node.images.has(record.instance_type, &record.spec.image)
                && need.fits_in(free);
            if fits {
                let fullness = fullness(node.schedulable, free, need);
                scored.push((index, if strategy == Strategy::BinPack { fullness } else { -fullness }));
            }
        }
        let best = scored.iter().map(|(_, score)| *score).fold(f64::NEG_INFINITY, f64::max);
        scored.retain(|(_, score)| *score >= best - NEAR);
        if !scored.is_empty() {
            let (index, _) = scored[rng.random_range(0..scored.len())];
            allocated[index] = allocated[index].plus(need);
            bound.insert(record.id.clone(), index);
        }
    }
    watch.outcome(records.len(), bound.len())
}

fn median(mut outcomes: Vec<Outcome>) -> Outcome {
    outcomes.sort_by(|a, b| a.per_cpu_second.total_cmp(&b.per_cpu_second));
    outcomes[outcomes.len() / 2]
}

/// One line of the table.
struct Figure {
    name: &'static str,
    strategy: Strategy,
    bar: f64,
    fleet: Outcome,
    with_asks: Outcome,
    rows: Outcome,
}

impl Figure {
    fn ratio(&self) -> f64 {
        self.fleet.per_cpu_second / self.rows.per_cpu_second
    }

    fn text(&self) -> String {
        format!(
            "{:<22} {:<9} {:>9.0} {:>9.0} {:>9.0} {:>9.0} {:>9.0} {:>6.0}   {} of {DECISIONS} placed",
            self.name,
            self.strategy.to_string(),
            self.bar,
            self.fleet.per_second,
            self.fleet.per_cpu_second,
            self.with_asks.per_cpu_second,
            self.rows.per_cpu_second,
            self.ratio(),
            self.fleet.placed
        )
    }

    fn json(&self) -> String {
        format!(
            "{{\"measure\":\"{}\",\"strategy\":\"{}\",\"nodes\":{NODES},\"runs\":{RUNS},\"decisions\":{DECISIONS},\
             \"placed\":{},\"bar\":{:.0},\"per_second\":{:.0},\"per_cpu_second\":{:.0},\
             \"with_asks_per_cpu_second\":{:.0},\"rows_per_cpu_second\":{:.0},\"ratio\":{:.1}}}",
            self.name,
            self.strategy,
            self.fleet.placed,
            self.bar,
            self.fleet.per_second,
            self.fleet.per_cpu_second,
            self.with_asks.per_cpu_second,
            self.rows.per_cpu_second,
            self.ratio()
        )
    }
}

fn measure(
    name: &'static str,
    bar: f64,
    make: fn(usize) -> Vec<InstanceRecord>,
    strategy: Strategy,
) -> Figure {
    let records = make(DECISIONS);
    let fleet = |beforehand| median((0..RUNS).map(|_| run_fleet(&records, strategy, beforehand)).collect());
    let rows = || run_rows(&records[..BASELINE_DECISIONS], strategy);
    Figure {
        name,
        strategy,
        bar,
        fleet: fleet(true),
        with_asks: fleet(false),
        rows: median((0..RUNS).map(|_| rows()).collect()),
    }
}

fn main() {
    let json = std::env::args().any(|arg| arg == "--json");
    if !json {
        println!("decisions per second at {NODES} nodes, one thread, median of {RUNS} runs");
        println!(
            "{:<22} {:<9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>6}",
            "", "", "bar", "by clock", "by CPU", "with asks", "by rows", "ratio"
        );
    }
    for strategy in [Strategy::Spread, Strategy::BinPack] {
        let figures = [
            measure("8 shapes", 500_000.0, eight_shapes, strategy),
            measure("every shape different", 50_000.0, all_different, strategy),
        ];
        for figure in figures {
            println!("{}", if json { figure.json() } else { figure.text() });
        }
    }
}
