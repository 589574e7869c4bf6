//! The settings and their example.

use hypervisor_server::Settings;

#[test]
fn the_example_file_has_every_key_with_its_default_and_a_comment() {
    let example = include_str!("../../../../configs/server.example.yaml");
    assert_eq!(hv_config::example_differences::<Settings>(example), Vec::<String>::new());
}
