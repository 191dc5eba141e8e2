output "cluster_yaml" {
  description = "cluster.yaml, filled: terraform output -raw cluster_yaml > my-cluster.yaml"
  value = replace(templatefile("${path.module}/../../cluster.yaml", {
    region         = var.region
    ami            = var.ami
    subnet_a       = aws_subnet.private[0].id
    subnet_b       = aws_subnet.private[1].id
    security_group = aws_security_group.nodes.id
    head_profile   = aws_iam_instance_profile.nodes["head"].name
    worker_profile = aws_iam_instance_profile.nodes["worker"].name
  }), "cluster_name: omnifer", "cluster_name: ${var.name}")
}

output "mlflow_uri" {
  description = "For recipes: --set tracking.uri=..."
  value       = "http://${local.mlflow_host}:5000"
}

output "runs" {
  description = "Run folders lie below: --run .../NAME"
  value       = "s3://${var.runs_bucket}/runs"
}

output "sources" {
  description = "Labeled sets and pools."
  value       = "s3://${var.sources_bucket}"
}
