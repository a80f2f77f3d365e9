//! What a person tries on a first day.

use super::*;

#[test]
fn d1_a_launcher_without_mpi_is_refused_by_its_variable() {
    let place = Place::new();
    for (variable, value) in [("OMPI_COMM_WORLD_SIZE", "2"), ("PMI_SIZE", "2"), ("PMIX_RANK", "1")]
    {
        let done = place.run_with(&train(""), &[(variable, value)]);
        let error = text(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{error}");
        assert!(error.contains(&format!("{variable}={value}")), "{error}");
        assert!(error.contains("`--mpi`"), "{error}");
        assert!(!place.path("out").exists(), "nothing was written");
    }
    // A launcher of one process is none.
    let done = place.run_with(&train(""), &[("OMPI_COMM_WORLD_SIZE", "1")]);
    assert!(done.status.success(), "{}", text(&done.stderr));
}
